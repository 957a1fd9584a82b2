#!/usr/bin/env bash
# Does `--preset fast`, which was found on pictures with large files, also align? The text encoder's runs of capabilities.sh again, same
# prompts and seeds, with that preset, judged as evaluate.sh says; the default preset's numbers are kept in docs/experiments/capabilities.
# One thread a run and two runs at a time, for two cores. Started again, it goes on where it was; what has left its SET-SEED.json
# is done, so that a machine can begin with the files of another.
# Usage: docs/experiments/fast.sh FOLDER
set -euo pipefail
out=${1:?give a folder for the runs and the evaluations}
here=$(cd "$(dirname "$0")" && pwd)
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HERE=$here
mkdir -p "$out"
"$here/sets-and-seeds.sh" | xargs -P 2 -L 1 bash -c '
  set -euo pipefail
  run=$0/$1-$2-run
  [ ! -e "$0/$1-$2.json" ] || exit 0
  "$HERE/train.sh" "$run" --reward tiny-clip --prompts "$1" --model tiny --preset fast --seed "$2" 2>> "$run.log"
  "$HERE/evaluate.sh" "$0/$1-$2" "$1" base=tiny "texforce=tiny+$run"' "$out"
python "$here/side_by_side.py" "$out/fast.png" "default=$here/capabilities" "--preset fast=$out"
