#!/usr/bin/env bash
# Alignment on the embedded model: four capabilities, three seeds, the default preset, rewarded by tiny-clip; then 16 pictures
# of every prompt, seen and unseen, with and without the LoRA (same noise, seeds that no training image has), which
# alignment.py has judged by tiny-clip and by tiny-judge, a model that no run was rewarded by.
# One thread a run and two runs at a time, for two cores. Started again, it goes on where it was.
# Usage: docs/experiments/alignment.sh FOLDER
set -euo pipefail
out=${1:?give a folder for the runs}
here=$(cd "$(dirname "$0")" && pwd)
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HERE=$here
mkdir -p "$out"
"$here/sets-and-seeds.sh" | xargs -P 2 -L 1 bash -c '
  set -euo pipefail
  run=$0/$1-$2
  "$HERE/train.sh" "$run" --reward tiny-clip --prompts "$1" --model tiny --seed "$2" 2>> "$run.log"
  if [ ! -e "$run-pictures/done" ]; then
    rm -rf "$run-pictures"
    texforce sample --prompts "$1" --model tiny --lora "$run" --compare --seeds 1000:1016 --out "$run-pictures" 2>> "$run.log"
    touch "$run-pictures/done"
  fi' "$out"
rm -f "$out/scores.jsonl"
for set in color count composition location; do
  python "$here/alignment.py" score "$set" "$out/$set"-*-pictures >> "$out/scores.jsonl"
done
