#!/usr/bin/env bash
# Loop layers 13 to 16 of a model with K = 3, inspect the result, verify it, and restore the base.
#
#     examples/quickstart.sh demo/SmolLM2-135M-Instruct demo/quickstart
set -euo pipefail

if [ $# -ne 2 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi

model=$1
directory=$2

loopexport convert "$model" "$directory/looped" --span 13:17 --steps 3 --dry-run
loopexport convert "$model" "$directory/looped" --span 13:17 --steps 3
loopexport inspect "$directory/looped"
loopexport verify "$directory/looped"
loopexport restore "$directory/looped" "$directory/base-again"
