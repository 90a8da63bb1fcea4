#!/usr/bin/env bash
# DSR's small preset at 128 x 128: one latent model for four categories, trained once, and then
# each category with it. Finished runs are skipped, interrupted ones go on.
#
#   ANOMALY_LIT_DATA=DIR experiments/dsr/run.sh [OUTPUT_DIR [CATEGORY ...]]
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
out=${1:-outputs/dsr}
shift $(($# > 0))
all=(toothbrush magnetic_tile hazelnut_toy ksdd)
categories=("${@:-${all[@]}}")

run() {  # name, categories, steps, further settings
  anomaly-train method=dsr_small dataset=mvtec_ad 'dataset.root=${oc.env:ANOMALY_LIT_DATA}/industrial' \
    image_size=128 "dataset.categories=[$2]" "trainer.max_steps=$3" "trainer.val_check_interval=$3" \
    seed=0 "output_dir=$out/$1" "${@:4}"
}

run shared/latent "$(IFS=, && echo "${all[*]}")" 1000 'method.shares=[1,0,0]' dataset.balanced=true \
  'method.texture_dir=${oc.env:ANOMALY_LIT_DATA}/textures'
for category in "${categories[@]}"; do
  run "none_${category}_seed0" "$category" 600 "method.latent_weights=$out/shared/latent/checkpoints/last.ckpt"
done
python experiments/tables.py collect experiments/dsr "$out"
