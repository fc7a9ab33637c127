#!/usr/bin/env bash
# Compare an export with its base on vLLM, on two GPUs. LoopExport and lm-evaluation-harness have to be installed in the
# environment of vLLM: pip install "loopexport[eval]".
#
#     examples/serve_vllm/compare.sh demo/SmolLM2-135M-Instruct-looped arc_easy,openbookqa demo/compared-vllm
set -euo pipefail

if [ $# -ne 3 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi

export=$1
tasks=$2
out=$3

loopexport compare "$export" --tasks "$tasks" --backend vllm --model-args tensor_parallel_size=2 --out "$out"
