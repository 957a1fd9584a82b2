#!/usr/bin/env bash
# 16 pictures of every prompt, seen and unseen, for each variant, with seeds that no training image has, in ten steps at guidance 1, as the
# default preset draws; judged by tiny-clip, their reward, and by tiny-judge, a model that no run was rewarded by. Leaves
# FOLDER.json, the mean of each prompt.   Usage: docs/experiments/evaluate.sh FOLDER PROMPTS NAME=MODEL[+LORA]...     (one is called base)
set -euo pipefail
out=$1 prompts=$2
shift 2
variants=()
for variant in "$@"; do variants+=(--variant "$variant"); done
texforce eval "${variants[@]}" --baseline base --prompts "$prompts" --seeds 1000:1016 --guidance 1 --steps 10 --metric tiny-clip \
  --metric tiny-judge --out "$out" >> "$out.log" 2>&1
python "$(dirname "$0")/evaluation.py" means "$out"
