"""Greedy tokens of vLLM engines, in a separate process. Imports vLLM, but nothing of LoopExport.

    python vllm_worker.py RUNS.json OUTCOMES.json

RUNS.json is a list of objects with `engine`, the arguments of `vllm.LLM`; `calls`, lists of prompts of token ids, each
list given to the engine after the previous answers; `max_tokens`; and maybe `adapters`, the directory of the adapter of
each prompt of a list, or null. OUTCOMES.json gets one object for each run:
`tokens`, lists as in `calls`; `logprobs`, the log-probability of each token; and `cached`, the number of tokens of each
prompt in vLLM's prefix cache; or `error`.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from pathlib import Path
from zlib import crc32


def main(runs: str, outcomes: str) -> None:
    """Run the engines of one file, and write the results so far to the other after each run."""
    done: list[dict] = []
    for run in json.loads(Path(runs).read_text()):
        try:
            done.append(generate(**run))
        except Exception as error:  # anything may stop an engine; the next one may still run
            traceback.print_exc()
            done.append({"error": str(error)})
        Path(outcomes).write_text(json.dumps(done))
        gc.collect()


def generate(engine: dict, calls: list[list[list[int]]], max_tokens: int, adapters: list | None = None) -> dict:
    """The answers of one engine."""
    import vllm

    model = vllm.LLM(skip_tokenizer_init=True, **engine)
    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, logprobs=1
    )
    options = {"use_tqdm": False, "lora_request": adapters and [_adapter(each) for each in adapters]}
    answers = [
        model.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, **options) for prompts in calls
    ]
    return {
        "tokens": [[list(each.outputs[0].token_ids) for each in answer] for answer in answers],
        "logprobs": [[_logprobs(each.outputs[0]) for each in answer] for answer in answers],
        "cached": [[each.num_cached_tokens for each in answer] for answer in answers],
    }


def _adapter(directory: str | None):
    from vllm.lora.request import LoRARequest

    return directory and LoRARequest(directory, 1 + crc32(directory.encode()) % 2**31, directory)


def _logprobs(output) -> list[float]:
    return [choices[token].logprob for token, choices in zip(output.token_ids, output.logprobs, strict=True)]


if __name__ == "__main__":
    main(*sys.argv[1:])
