#!/usr/bin/env bash
# Methods with a memory, each beside itself with the memory switched off: the runs of ../small, a minute
# of one core each. Where training is the same, one run is tested twice. What is done is not done again.
#
#   ANOMALY_LIT_DATA=DIR ANOMALY_LIT_WEIGHTS=DIR experiments/memory/run.sh [OUTPUT_DIR]
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
out=$(realpath -m "${1:-outputs/memory}")
export ANOMALY_LIT_SMALL=$out ANOMALY_LIT_CACHE=$out/cache

train() {  # FOLDER PROGRAM SETTINGS...: FOLDER is CATEGORY/METHOD/NAME
  local folder=$1 program=$2
  shift 2
  [ -e "$out/$folder/metrics.json" ] && return
  $program --config-dir=experiments/small/conf "dataset=${folder%%/*}" cache=disk when_changed=keep \
    callbacks.outputs.max_images=4 callbacks.training_pictures.max_images=2 "$@" \
    "output_dir=$out/$folder" || echo "failed: $folder"
}

again() {  # FOLDER TRAINED SETTINGS...: test a trained run once more
  local folder=$1 trained=$2
  shift 2
  [ -e "$out/$folder/metrics.json" ] && return
  anomaly-test "ckpt_path=$out/$trained/checkpoints/last.ckpt" "$@" max_images=0 "output_dir=$out/$folder" ||
    echo "failed: $folder"
}

without_memory="python experiments/memory/fmr_net_without.py"
skips='method.laterals=[none,skip,skip,skip,skip]' memories='method.laterals=[none,pmb,pmb,pmb,pmb]'

for category in toothbrush magnetic_tile ball_screw; do
  train $category/pni/given anomaly-train experiment=small_pni seed=0
  again $category/pni/no_conditions $category/pni/given +method.tau=-1
done
for category in toothbrush elpv_mono; do
  train $category/sap2/given anomaly-train experiment=small_sap2 seed=0
  again $category/sap2/raw $category/sap2/given +method.score=raw
  train $category/nln/given anomaly-train experiment=small_nln seed=0
  again $category/nln/own $category/nln/given +method.error=own
done
for seed in 0 1; do
  train toothbrush/pmb/given_$seed anomaly-train experiment=small_pmb seed=$seed
  again toothbrush/pmb/no_hee_$seed toothbrush/pmb/given_$seed +method.hee=false
  train toothbrush/pmb/skips_$seed anomaly-train experiment=small_pmb "$skips" seed=$seed
  train toothbrush/fmr_net/given_$seed anomaly-train experiment=small_fmr_net seed=$seed
  train toothbrush/fmr_net/without_$seed "$without_memory" experiment=small_fmr_net seed=$seed
done
train toothbrush/pmb/memories_0 anomaly-train experiment=small_pmb "$memories" seed=0
train toothbrush/fmr_net/no_rearrangement_0 anomaly-train experiment=small_fmr_net method.rearrange=none seed=0
