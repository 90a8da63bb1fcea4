#!/usr/bin/env bash
# Four methods x two backbones x four categories, 30 steps each: it shows the machinery of sweeps,
# not how good the methods are. The same command goes on with an interrupted sweep.
#
#   ANOMALY_LIT_DATA=DIR ANOMALY_LIT_WEIGHTS=DIR experiments/sweep/run.sh [OUTPUT_DIR]
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"
out=${1:-outputs/sweep}
anomaly-train -m hydra/launcher=process hydra.launcher.jobs=2 \
  method=ami_net_small,mfrnet_small,onenip_small,uniad_small \
  backbone=resnet18,mobilenetv2_100_tf2 dataset=mvtec_ad \
  'dataset.root=${oc.env:ANOMALY_LIT_DATA}/industrial' \
  'dataset.categories=[hazelnut_toy],[ksdd],[magnetic_tile],[toothbrush]' \
  trainer.max_steps=30 trainer.val_check_interval=30 seed=0 "output_dir=$out"
anomaly-report "$out"
