#!/usr/bin/env bash
# Table 2 of the paper at the size of the embedded model: does TexForce work on a backbone of the other prediction type? All that
# capabilities.sh does (the text encoder, the U-Net, and both put together with weight 1 each), same commands, prompts and seeds, on
# the second backbone, which predicts the noise (the first predicts v):
#     python -m tools.tiny build/epsilon --epsilon
# Judged as evaluate.sh says; the first backbone's numbers are kept in docs/experiments/capabilities. The runs of the U-Net were added
# when those of the text encoder were there.
# One thread a run and two runs at a time, for two cores. Started again, it goes on where it was; what has left its SET-SEED.json
# is done, so that a machine can begin with the files of another.
# Usage: docs/experiments/backbones.sh FOLDER MODEL     (MODEL: build/epsilon/weights)
set -euo pipefail
out=${1:?give a folder for the runs and the evaluations}
model=${2:?give the folder of the second backbone}
here=$(cd "$(dirname "$0")" && pwd)
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HERE=$here MODEL=$model
mkdir -p "$out"
"$here/sets-and-seeds.sh" | xargs -P 2 -L 1 bash -c '
  set -euo pipefail
  texforce=$0/$1-$2-run ddpo=$0/$1-$2-unet prompts=$0/$1.jsonl
  [ ! -e "$0/$1-$2.json" ] || exit 0
  [ -e "$prompts" ] || python "$HERE/evaluation.py" prompts "$1" "$prompts"
  for run in "$texforce" "$ddpo"; do
    trained=text-encoder; [ "$run" = "$texforce" ] || trained=unet
    "$HERE/train.sh" "$run" --reward tiny-clip --prompts "$prompts" --model "$MODEL" --preset tiny --train "$trained" --seed "$2" 2>> "$run.log"
  done
  "$HERE/evaluate.sh" "$0/$1-$2" "$prompts" "base=$MODEL" "texforce=$MODEL+$texforce" "ddpo=$MODEL+$ddpo" "both=$MODEL+$texforce+$ddpo"' "$out"
python "$here/capabilities.py" "$out" "$out/second.png" "$out/second-pictures.png"
python "$here/side_by_side.py" "$out/backbones.png" "predicts v=$here/capabilities" "predicts noise=$out"
