#!/usr/bin/env bash
# DSR's small preset on small images: one latent model for four categories, trained once, and then
# each category with it. Finished runs are skipped, interrupted ones go on. ball_screw, which the
# latent model has not seen, may be named as well.
#
#   ANOMALY_LIT_DATA=DIR experiments/dsr/run.sh [OUTPUT_DIR [SIDE [CATEGORY ...]]]
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
out=${1:-outputs/dsr} side=${2:-128}
shift $(($# < 2 ? $# : 2))
all=(toothbrush magnetic_tile hazelnut_toy ksdd)
categories=("${@:-${all[@]}}")

run() {  # name, categories, steps, further settings
  local root=industrial
  if [ "$2" = ball_screw ]; then root=surface; fi
  anomaly-train method=dsr_small dataset=mvtec_ad "dataset.root=\${oc.env:ANOMALY_LIT_DATA}/$root" \
    "image_size=$side" "dataset.categories=[$2]" "trainer.max_steps=$3" "trainer.val_check_interval=$3" \
    seed=0 "output_dir=$out/$1" "${@:4}"
}

run latent "$(IFS=, && echo "${all[*]}")" 1000 'method.shares=[1,0,0]' dataset.balanced=true \
  'method.texture_dir=${oc.env:ANOMALY_LIT_DATA}/textures'
for category in "${categories[@]}"; do
  run "$category" "$category" 800 "method.latent_weights=$out/latent/checkpoints/last.ckpt" \
    dataset.batch_size=4 trainer.precision=bf16-mixed
done
for name in latent "${categories[@]}"; do
  cp "$out/$name/metrics.json" "experiments/dsr/shared/${name}_$side.json"
done
