#!/usr/bin/env bash
# Fig. 5 of the paper at the size of the embedded model: four capabilities, three seeds, rewarded by tiny-clip; TexForce trains
# the text encoder (the runs of alignment.sh, made here where they are not there), DDPO the U-Net (made here, by the same command
# with --train unet), and both are put together with weight 1 each, without training; judged as evaluate.sh says, on 29 seen prompts (464 pictures a
# variant) and 10 unseen ones (160).
# One thread a run and two runs at a time, for two cores. Started again, it goes on where it was; what has left its SET-SEED.json
# is done, so that a machine can begin with the files of another.
# Usage: docs/experiments/capabilities.sh FOLDER ALIGNMENT     (ALIGNMENT: the folder of alignment.sh)
set -euo pipefail
out=${1:?give a folder for the runs of the U-Net and the evaluations}
alignment=${2:?give the folder of the runs of alignment.sh}
here=$(cd "$(dirname "$0")" && pwd)
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HERE=$here ALIGNMENT=$alignment
mkdir -p "$out" "$alignment"
"$here/sets-and-seeds.sh" | xargs -P 2 -L 1 bash -c '
  set -euo pipefail
  texforce=$ALIGNMENT/$1-$2 ddpo=$0/$1-$2-unet
  [ ! -e "$0/$1-$2.json" ] || exit 0
  "$HERE/train.sh" "$texforce" --reward tiny-clip --prompts "$1" --model tiny --seed "$2" 2>> "$texforce.log"
  "$HERE/train.sh" "$ddpo" --reward tiny-clip --prompts "$1" --model tiny --seed "$2" --train unet 2>> "$ddpo.log"
  "$HERE/evaluate.sh" "$0/$1-$2" "$1" base=tiny "texforce=tiny+$texforce" "ddpo=tiny+$ddpo" "both=tiny+$texforce+$ddpo"' "$out"
python "$here/capabilities.py" "$out" "$out/capabilities.png" "$out/capabilities-pictures.png"
