"""Runs a vLLM engine in a process of its own and writes the tokens that it gives; needs vLLM and nothing of LoopExport.

Usage: python vllm_worker.py JOB.json, a JSON list of runs, each an object with `engine` (arguments of `vllm.LLM`),
`prompts` (lists of token ids, or lists of those, which are then given one call after the other) and `max_tokens`. Writes what came of each to
JOB.json.out: `tokens` and `cached` (how many tokens of each prompt were found in the prefix cache), or `error`.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from pathlib import Path


def main(path: str) -> None:
    """Run the jobs in a file."""
    outcomes = []
    for run in json.loads(Path(path).read_text()):
        try:
            outcomes.append(generate(**run))
        except Exception as error:  # whatever stops an engine: the next run may still work
            traceback.print_exc()
            outcomes.append({"error": f"{type(error).__name__}: {error}"})
        gc.collect()
        Path(f"{path}.out").write_text(json.dumps(outcomes))


def generate(engine: dict, calls: list, max_tokens: int) -> dict:
    """Greedy tokens of one engine; `calls` are lists of prompts, given to it one list after the other."""
    import vllm

    llm = vllm.LLM(skip_tokenizer_init=True, **engine)
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    tokens, cached = [], []
    for prompts in calls:
        results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        tokens.append([list(result.outputs[0].token_ids) for result in results])
        cached.append([result.num_cached_tokens for result in results])
    del llm
    return {"tokens": tokens, "cached": cached}


if __name__ == "__main__":
    main(sys.argv[1])
