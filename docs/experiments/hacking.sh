#!/usr/bin/env bash
# A reward that is hacked on purpose: jpeg-incompressibility for up to 7,680 images on the embedded model, three times the demo's;
# then pictures of the training prompts with every fifth epoch's LoRA and with none, judged by tiny-clip and tiny-judge.
# Started again, it goes on where it was.   Usage: docs/experiments/hacking.sh FOLDER
set -euo pipefail
out=${1:?give a folder for the run}
here=$(cd "$(dirname "$0")" && pwd)
export HF_HUB_OFFLINE=1
mkdir -p "$out"
run=$out/run
"$here/train.sh" "$run" --reward jpeg-incompressibility --prompts animals --model tiny --images 7680 --seed 10 --save-every 5
python "$here/hacking.py" "$run" "$out/judged.jsonl" "$out/hacking.png"
