#!/usr/bin/env bash
# AMI-Net (small) on four categories: a model per category and seed, one model for all of them,
# and another backbone. Two runs at a time, a thread each: six CPU-minutes a run. Finished runs
# are skipped, interrupted ones go on.
#
#   ANOMALY_LIT_DATA=DIR ANOMALY_LIT_WEIGHTS=DIR experiments/ami_net/run.sh [OUTPUT_DIR]
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
out=${1:-outputs/ami_net}
mkdir -p "$out"

run() {  # backbone, name of the data, categories, seed
  echo "method=ami_net_small backbone=$1 dataset=mvtec_ad trainer.max_steps=500 trainer.val_check_interval=500" \
    "'dataset.root=\${oc.env:ANOMALY_LIT_DATA}/industrial'" \
    "dataset.categories=[$3] seed=$4 output_dir=$out/$1_$2_seed$4"
}

{
  for category in toothbrush magnetic_tile ksdd hazelnut_toy; do
    run resnet18 $category $category 0
  done
  run resnet18 all toothbrush,hazelnut_toy,magnetic_tile,ksdd 0
  run mobilenetv2_100_tf2 magnetic_tile magnetic_tile 0
  for seed in 1 2; do
    for category in toothbrush magnetic_tile ksdd hazelnut_toy; do
      run resnet18 $category $category $seed
    done
  done
} | xargs -d '\n' -P 2 -I{} sh -c 'anomaly-train {} || echo "failed: {}"'
python experiments/tables.py collect experiments/ami_net "$out"
