#!/usr/bin/env bash
# Every method's small preset on five categories, as one sweep of one run at a time on one core.
# All methods on the first category come first, and then all on the next. The same command goes on
# where an earlier one was stopped. plan.py says how the steps were chosen. SEED=1 is another seed,
# for which OUTPUT_DIR should be another folder.
#
#   ANOMALY_LIT_DATA=DIR ANOMALY_LIT_WEIGHTS=DIR experiments/small/run.sh [OUTPUT_DIR [CATEGORIES [EXPERIMENTS [SETTINGS ...]]]]
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
ANOMALY_LIT_SMALL=$(realpath -m "${1:-outputs/small}")
export ANOMALY_LIT_SMALL ANOMALY_LIT_FEW=$ANOMALY_LIT_SMALL/few ANOMALY_LIT_CACHE=${ANOMALY_LIT_CACHE:-$ANOMALY_LIT_SMALL/cache}
categories=${2:-toothbrush,magnetic_tile,ball_screw,hazelnut_toy,ksdd}
experiments=${3:-$(python experiments/small/plan.py list)}
python experiments/small/plan.py few "$ANOMALY_LIT_FEW"
anomaly-train --config-dir=experiments/small/conf -m hydra/launcher=process \
  "dataset=$categories" "experiment=$experiments" "seed=${SEED:-0}" cache=disk when_changed=keep \
  callbacks.outputs.max_images=4 callbacks.training_pictures.max_images=2 \
  'hydra.sweep.subdir=${hydra:runtime.choices.dataset}_${hydra:runtime.choices.experiment}' \
  "output_dir=$ANOMALY_LIT_SMALL" "${@:4}" ||
  echo "some runs failed: their job.log says why, and the others stand"
anomaly-report "$ANOMALY_LIT_SMALL"
