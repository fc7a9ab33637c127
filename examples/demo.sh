#!/usr/bin/env bash
# Make a base model, loop it, ask it a question, compare it with its base; prints each command before running it.
#
#     examples/demo.sh demo
#
# `python` and `loopexport` must be on the PATH.
set -euo pipefail

if [ $# -ne 1 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi

here=$(dirname "$0")
work=$1
base=$work/SmolLM2-135M-Instruct
looped=$work/SmolLM2-135M-Instruct-looped
question="What is the capital of France?"

run() {
    printf '\n\033[1m$ %s\033[0m\n' "$*"
    "$@"
}

mkdir -p "$work"
run python "$here/smollm2_checkpoint.py" "$base"
run loopexport convert "$base" "$looped" --span 13:17 --steps 3 --overwrite
run loopexport inspect "$looped"
run loopexport verify "$looped"
run python "$here/answer.py" "$base" "$question"
run python "$here/answer.py" "$looped" "$question" | tee "$work/answer.txt"
run loopexport onnx "$looped"
run loopexport run "$looped" "$question" | tee "$work/answer-onnx.txt"
# Each file starts with an empty line and the command; answer.py also prints the class of the model before the answer.
if [ "$(tail -n +3 "$work/answer.txt" | sed '1s/^[^:]*: //')" != "$(tail -n +3 "$work/answer-onnx.txt")" ]; then
    echo "transformers and ONNX Runtime give different answers" >&2
    exit 1
fi
printf '\nONNX Runtime gives the same answer as transformers.\n'
rm -rf "$work/compared"  # of an earlier demo
run loopexport compare "$looped" --items "$here/items/arithmetic.jsonl" --out "$work/compared"
printf '\nThe looped model is in %s. In reproductions, models this small gained nothing from looping:\n' "$looped"
printf 'this shows that the tool works, not that looping helps.\n'
