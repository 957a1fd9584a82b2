#!/usr/bin/env bash
# The runs of alignment.sh, capabilities.sh, backbones.sh and fast.sh, a line each: set of prompts, seed.
for seed in 10 11 12; do
  for set in color count composition location; do
    echo "$set $seed"
  done
done
