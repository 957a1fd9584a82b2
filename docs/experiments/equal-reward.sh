#!/usr/bin/env bash
# Fig. 4 of the paper, and what its Table 3 asks, at the size of the embedded model: the text encoder and the U-Net of
# main-job.sh at the same reward, at the end and half way there, both together without training, both trained together. For every
# seed of training eleven variants draw every prompt of `animals`, seen and unseen, with eight seeds that no training image has, in
# the steps and at the guidance that the runs are trained with; judged by the reward and by two judges that no run was rewarded by.
# Which checkpoints are compared is chosen by a rule (equal_reward.py) from the runs' own held-out pairs, not from these pictures.
# One thread an evaluation and two at a time, for two cores. Started again, it goes on where it was.
# Usage: docs/experiments/equal-reward.sh FOLDER MAIN SEED...     (MAIN: the folder of main-job.sh with these seeds)
set -euo pipefail
out=${1:?give a folder for the evaluations}
main=${2:?give the folder of the runs of main-job.sh}
shift 2
[ $# -gt 0 ] || { echo "give the seeds of the runs" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
mkdir -p "$out"
python "$here/equal_reward.py" choose "$main" "$out" "$@"
printf '%s\n' "$@" | xargs -P 2 -L 1 bash -c '
  texforce eval --variants "$0/$1.toml" --baseline base --prompts animals --seeds 1000:1008 --guidance 1 --steps 10 \
    --metric jpeg-incompressibility --metric tiny-clip --metric tiny-judge --out "$0/$1" >> "$0/$1.log" 2>&1' "$out"
python "$here/equal_reward.py" report "$out" "$out/equal-reward.png" "$@"
