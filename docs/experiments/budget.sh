#!/usr/bin/env bash
# How many images should `--preset fast` take on the embedded model? Its rate falls to zero by then, so that a budget is more than where it ends.
# On the tuning seeds 100 to 103 of jpeg-incompressibility: the default preset, and `fast` with 3,840, 5,120 and 6,400 images, measured after
# every epoch on 64 held-out pairs. The rule, committed before the runs: the smallest of these budgets with which `fast` ends at or above where the
# default ends, on each of the four seeds; the largest if there is none. Whether it aligns is asked afterwards (fast.sh), and how long it takes
# to a reward, with other seeds (benchmarks/time_to_reward.py).
# One thread a run and two runs at a time, for two cores. Started again, it goes on where it was.
# Usage: docs/experiments/budget.sh FOLDER
set -euo pipefail
out=${1:?give a folder for the runs}
here=$(cd "$(dirname "$0")" && pwd)
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HERE=$here
mkdir -p "$out"
for seed in 100 101 102 103; do
  for run in "tiny 6400" "fast 3840" "fast 5120" "fast 6400"; do
    echo "$seed $run"
  done
done | xargs -P 2 -L 1 bash -c '
  "$HERE/train.sh" "$0/$2-$3-$1" --reward jpeg-incompressibility --prompts animals --model tiny --preset "$2" --images "$3" --seed "$1" \
    --eval-every 1 2>> "$0/$2-$3-$1.log"' "$out"
python "$here/budget.py" "$out"
