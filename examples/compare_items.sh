#!/usr/bin/env bash
# Compare a loop with its base on a file of your own items, and save the result in the export.
#
#     examples/compare_items.sh demo/SmolLM2-135M-Instruct-looped examples/items/capitals.jsonl demo/capitals
set -euo pipefail

if [ $# -ne 3 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi

export=$1
items=$2
out=$3

loopexport compare "$export" --items "$items" --out "$out" --save
loopexport inspect "$export"
