#!/usr/bin/env bash
# The video auto-encoder's small preset on UCSD Ped2, one core, and two baselines on the same frames.
#
#   ANOMALY_LIT_DATA=DIR experiments/video_ae/run.sh [STEPS [OUTPUT_DIR]]   # DIR/video/ped2
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
steps=${1:-2000} out=${2:-outputs/video_ae}
python experiments/video_ae/baselines.py "$ANOMALY_LIT_DATA/video/ped2"
anomaly-train method=video_ae_small dataset=clips 'dataset.root=${oc.env:ANOMALY_LIT_DATA}/video/ped2' \
  'image_size=[64,96]' dataset.batch_size=4 "trainer.max_steps=$steps" "trainer.val_check_interval=$steps" \
  seed=0 "output_dir=$out"
