#!/usr/bin/env bash
# Scan spans of two widths with two numbers of steps, and draw a heatmap of the differences.
#
#     examples/scan.sh demo/SmolLM2-135M-Instruct examples/items/capitals.jsonl demo/scanned
set -euo pipefail

if [ $# -ne 3 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi

model=$1
items=$2
out=$3

loopexport scan "$model" --width 2,4 --stride 7 --steps 2,4 --items "$items" --out "$out" --dry-run
loopexport scan "$model" --width 2,4 --stride 7 --steps 2,4 --items "$items" --out "$out"
