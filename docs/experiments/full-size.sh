#!/usr/bin/env bash
# Does every command work on a model of Stable Diffusion 1.5's size? One with random weights (a folder of 2 GB), on a CPU, as little of
# everything as there can be: one epoch of two images of 512 pixels in four steps. A quarter of an hour on a fast core, 5 GB of memory.
# Usage, from the root of the repository: docs/experiments/full-size.sh FOLDER
set -euo pipefail
out=${1:?give a folder}
model=$out/sd15
export HF_HUB_OFFLINE=1
mkdir -p "$out"
[ -e "$model" ] || python -c '
import sys, torch
from benchmarks.gpu import pipeline_of
pipeline_of("sd15", torch.device("cpu"), torch.float16).save_pretrained(sys.argv[1])' "$model"
texforce doctor --model "$model" --device cpu --precision bf16
texforce train --model "$model" --device cpu --precision bf16 --reward brightness --prompts color --steps 4 --samples-per-epoch 2 \
  --micro-batch 1 --grad-accum 2 --epochs 1 --eval-images 2 --eval-steps 2 --out "$out/run"
texforce sample "a cat" --model "$model" --device cpu --precision bf16 --lora "$out/run" --steps 2 --seeds 0:1 --compare --grid --out "$out/pictures"
texforce eval --variant "base=$model" --variant "tuned=$model+$out/run" --prompts color --seeds 0:1 --steps 2 --device cpu --precision bf16 \
  --metric brightness --out "$out/evaluation"
texforce fuse "$out/run:0.7" --format kohya --out "$out/kohya.safetensors"
texforce fuse --inspect "$out/kohya.safetensors"
