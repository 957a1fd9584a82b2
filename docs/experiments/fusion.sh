#!/usr/bin/env bash
# Fig. 12 of the paper at the size of the embedded model: for three seeds, two LoRAs of the text encoder, one rewarded for
# bright pictures and one for large JPEG files, fused at five ratios without training; 16 pictures of every prompt of
# `animals`, seen and unseen, with seeds that no training image has, scored by both rewards.
# One thread a run and two runs at a time, for two cores. Started again, it goes on where it was.
# Usage: docs/experiments/fusion.sh FOLDER
set -euo pipefail
out=${1:?give a folder for the runs}
here=$(cd "$(dirname "$0")" && pwd)
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HERE=$here
mkdir -p "$out"
for seed in 10 11 12; do
  for reward in brightness jpeg-incompressibility; do
    echo "$reward $seed"
  done
done | xargs -P 2 -L 1 bash -c '
  set -euo pipefail
  run=$0/$1-$2
  "$HERE/train.sh" "$run" --reward "$1" --prompts animals --model tiny --train text-encoder --seed "$2" 2>> "$run.log"' "$out"
for seed in 10 11 12; do
  echo "base $seed 0 0"
  for ratio in 0 0.25 0.5 0.75 1; do
    echo "$ratio $seed $ratio $(python -c "print(1 - $ratio)")"
  done
done | xargs -P 2 -L 1 bash -c '
  set -euo pipefail
  pictures=$0/pictures-$2-$1
  if [ ! -e "$pictures/done" ]; then
    rm -rf "$pictures"
    lora=()
    if [ "$1" != base ]; then
      fused=$0/fused-$2-$1.safetensors
      texforce fuse "$0/brightness-$2:$3" "$0/jpeg-incompressibility-$2:$4" --out "$fused" --force 2>> "$0/fused.log"
      lora=(--lora "$fused")
    fi
    texforce sample --prompts animals --model tiny "${lora[@]}" --seeds 1000:1016 --guidance 1 --steps 10 \
      --out "$pictures" 2>> "$0/fused.log"
    touch "$pictures/done"
  fi' "$out"
python "$here/fusion.py" "$out" "$out/fusion.png"
