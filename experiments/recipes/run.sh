#!/usr/bin/env bash
# Four methods that learn from synthetic defects x two backbones x two recipes, on toothbrush, by the
# process launcher, one run of one thread at a time. PRN needs four stages, and the ResNet-18
# weights at hand have three (`layers1to3`), so MobileNetV2 takes its place there. The same command
# goes on where an earlier one was stopped.
#
#   ANOMALY_LIT_DATA=DIR ANOMALY_LIT_WEIGHTS=DIR experiments/recipes/run.sh [OUTPUT_DIR [STEPS]]
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
out=${1:-outputs/recipes} steps=${2:-20}
sweep() {
  anomaly-train --config-dir=experiments/recipes/conf -m hydra/launcher=process \
    "method=$1" "backbone=$2" synthesis=draem,saliency \
    dataset=mvtec_ad 'dataset.root=${oc.env:ANOMALY_LIT_DATA}/industrial' 'dataset.categories=[toothbrush]' \
    "trainer.max_steps=$steps" "trainer.val_check_interval=$steps" seed=0 when_changed=keep \
    callbacks.outputs.max_images=4 "output_dir=$out" ||
    echo "some runs failed: their job.log says why, and the others stand"
}
sweep adtr_masks_small,cma_ae_small,onenip_small resnet18,tf_efficientnet_lite0
sweep prn_small mobilenetv2_100_tf2,tf_efficientnet_lite0
anomaly-report "$out" --pictures 0
