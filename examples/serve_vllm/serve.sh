#!/usr/bin/env bash
# Serve an export with vLLM, ask it one question, stop. LoopExport need not be installed.
#
#     examples/serve_vllm/serve.sh demo/SmolLM2-135M-Instruct-looped "What is the capital of France?" --dtype float32
#
# The script passes all further options to vLLM, such as --tensor-parallel-size 2 or --port 8001. The `python` on the
# PATH must have vLLM.
set -euo pipefail

if [ $# -lt 2 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi

directory=$1
question=$2
shift 2
port=8000
before=
for option in "$@"; do
    case $before:$option in
    --port:*) port=$option ;;
    *:--port=*) port=${option#--port=} ;;
    esac
    before=$option
done

python -m vllm.entrypoints.openai.api_server --model "$directory" --served-model-name looped --trust-remote-code "$@" >&2 &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" || true' EXIT

until python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:$port/health')" 2>/dev/null; do
    kill -0 "$server" # ends this script if the server has ended; the server printed why
    sleep 1
done
python "$(dirname "$0")/ask.py" "http://127.0.0.1:$port/v1" "$question"
