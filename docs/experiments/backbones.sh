#!/usr/bin/env bash
# Table 2 of the paper at the size of the embedded model: does TexForce work on a backbone of the other prediction type? The runs of
# alignment.sh again, same commands and seeds, on the second backbone, which predicts the noise (the first predicts v):
#     python -m tools.tiny build/epsilon --epsilon
# The prompts are those files that the first runs left. 16 pictures of every prompt, seen (29) and unseen (10), as in capabilities.sh, whose folder holds the first backbone's pictures.
# One thread a run and two runs at a time, for two cores. Started again, it goes on where it was.
# Usage: docs/experiments/backbones.sh FOLDER MODEL ALIGNMENT CAPABILITIES     (MODEL: build/epsilon/weights)
set -euo pipefail
out=${1:?give a folder for the runs and the evaluations}
model=${2:?give the folder of the second backbone}
alignment=${3:?give the folder of the runs of alignment.sh}
first=${4:?give the folder of capabilities.sh}
here=$(cd "$(dirname "$0")" && pwd)
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HERE=$here MODEL=$model ALIGNMENT=$alignment
mkdir -p "$out"
"$here/sets-and-seeds.sh" | xargs -P 2 -L 1 bash -c '
  set -euo pipefail
  run=$0/$1-$2-run prompts=$ALIGNMENT/$1-$2/prompts.jsonl
  "$HERE/train.sh" "$run" --reward tiny-clip --prompts "$prompts" --model "$MODEL" --preset tiny --seed "$2" 2>> "$run.log"
  texforce eval --variant "base=$MODEL" --variant "texforce=$MODEL+$run" --baseline base --prompts "$prompts" --seeds 1000:1016 \
    --guidance 1 --steps 10 --metric tiny-clip --metric tiny-judge --out "$0/$1-$2" >> "$0/$1-$2.log" 2>&1' "$out"
python "$here/backbones.py" "$first" "$out" "$out/backbones.png"
