#!/usr/bin/env bash
# A method's small preset on four categories: one-class models, and, of methods that learn several
# categories at once, one model for all with each of two backbones. One run at a time, on all cores.
# Finished runs are skipped, interrupted ones go on.
#
#   ANOMALY_LIT_DATA=DIR ANOMALY_LIT_WEIGHTS=DIR experiments/run_small.sh METHOD STEPS [OUTPUT_DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
method=$1 steps=$2 out=${3:-outputs/$1}

run() {  # name of the backbones, name of the data, categories, further settings
  anomaly-train "method=${method}_small" dataset=mvtec_ad \
    'dataset.root=${oc.env:ANOMALY_LIT_DATA}/industrial' "dataset.categories=[$3]" \
    "trainer.max_steps=$steps" "trainer.val_check_interval=$steps" \
    seed=0 "output_dir=$out/$1_$2_seed0" "${@:4}" || echo "failed: $1 $2"
}

for category in toothbrush magnetic_tile ksdd hazelnut_toy; do
  case $method in
    rstpm) run mobilenetv2_100_tf2+resnet18 $category $category ;;  # its preset's two teachers
    dsr) run none $category $category "method.texture_dir=\${oc.env:ANOMALY_LIT_DATA}/textures" ;;
    *) run resnet18 $category $category backbone=resnet18 ;;
  esac
done
case $method in
  mfrnet | onenip | uniad)
    for backbone in resnet18 mobilenetv2_100_tf2; do
      run $backbone all toothbrush,hazelnut_toy,magnetic_tile,ksdd "backbone=$backbone"
    done
    ;;
esac
python experiments/tables.py collect "experiments/$method" "$out"
