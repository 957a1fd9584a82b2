#!/usr/bin/env bash
# Train into a run folder, or go on where it was stopped; a run that is finished is left alone.   Usage: docs/experiments/train.sh RUN OPTIONS...
set -euo pipefail
run=$1
shift
if grep -qs '"status": "finished"' "$run/run.json"; then
  exit
elif [ -e "$run/run.json" ]; then
  texforce train --resume "$run"
else
  texforce train "$@" --out "$run"
fi
