#!/usr/bin/env bash
# Train into a run folder, or go on where it was stopped.   Usage: docs/experiments/train.sh RUN OPTIONS...
set -euo pipefail
run=$1
shift
if [ -e "$run/run.json" ]; then
  texforce train --resume "$run"
else
  texforce train "$@" --out "$run"
fi
