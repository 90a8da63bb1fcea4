#!/usr/bin/env bash
# A study of AMI-Net's mask: TRIALS trials of at most 100 steps, pruned by the median of the others.
# The same command with more trials goes on with it.
#
#   ANOMALY_LIT_DATA=DIR ANOMALY_LIT_WEIGHTS=DIR experiments/mask_study/run.sh TRIALS [OUTPUT_DIR]
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"
out=${2:-outputs/mask_study}
anomaly-train -m experiment=ami_net_mask_study hydra/sweeper/pruner=median \
  hydra.launcher.jobs=2 "hydra.sweeper.n_trials=$1" \
  'dataset.root=${oc.env:ANOMALY_LIT_DATA}/industrial' 'dataset.categories=[hazelnut_toy]' \
  backbone=resnet18 trainer.max_steps=100 trainer.val_check_interval=25 "output_dir=$out"
anomaly-report "$out"
