#!/usr/bin/env bash
# AMI-Net (small) on four categories: a model per category and seed, one model for all of them,
# and another backbone. About three minutes a run on two CPU cores. Finished runs are skipped.
#
#   ANOMALY_LIT_DATA=DIR ANOMALY_LIT_WEIGHTS=DIR experiments/ami_net/run.sh [OUTPUT_DIR]
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"
out=${1:-outputs/ami_net}
categories=(toothbrush hazelnut_toy magnetic_tile ksdd)

train() {  # name, overrides
  local name=$1
  shift
  anomaly-train method=ami_net_small dataset=mvtec_ad \
    'dataset.root=${oc.env:ANOMALY_LIT_DATA}/industrial' output_dir="$out/$name" "$@"
}

for seed in 0 1 2; do
  for category in "${categories[@]}"; do
    train "resnet18_${category}_seed$seed" backbone=resnet18 "dataset.categories=[$category]" seed=$seed
  done
  train "resnet18_all_seed$seed" backbone=resnet18 \
    'dataset.categories=[toothbrush,hazelnut_toy,magnetic_tile,ksdd]' seed=$seed
done
for category in "${categories[@]}"; do
  train "mobilenetv2_100_tf2_${category}_seed0" backbone=mobilenetv2_100_tf2 \
    "dataset.categories=[$category]" seed=0
done
python experiments/tables.py collect experiments/ami_net "$out"
