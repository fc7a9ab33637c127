"""Greedy tokens of vLLM engines, in a separate process. Imports vLLM, but nothing of LoopExport.

    python vllm_worker.py RUNS.json OUTCOMES.json

RUNS.json is a list of objects with `engine`, the arguments of `vllm.LLM`; `flags`, command-line arguments as of vLLM's
server, which come before those; `calls`, lists of prompts of token ids, each list given to the engine after the
previous answers; `max_tokens`; and `adapters`, for each prompt of a list the directory of its adapter, or null.
OUTCOMES.json gets one object for each run: `tokens`, lists as in `calls`; `logprobs`, the log-probability of each
token; `cached`, the number of tokens of each prompt in the prefix cache; `settings`, a sentence about the engine; and
`drafts`, if it counts anything, how many tokens were drafted and how many of them accepted; or `error`, and
`is_flag_error` if it is about the flags.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import traceback
from pathlib import Path
from zlib import crc32


class FlagError(Exception):
    """vLLM does not know a flag, or not its value."""


def main(runs: str, outcomes: str) -> None:
    """Run the engines of one file, and write the results so far to the other after each run."""
    done: list[dict] = []
    for run in json.loads(Path(runs).read_text()):
        try:
            done.append(generate(**run))
        except Exception as error:  # anything may stop an engine; the next one may still run
            traceback.print_exc()
            done.append({"error": str(error) or type(error).__name__, "is_flag_error": isinstance(error, FlagError)})
        Path(outcomes).write_text(json.dumps(done))
        gc.collect()


def generate(
    engine: dict,
    calls: list[list[list[int]]],
    max_tokens: int,
    flags: list[str] | None = None,
    adapters: list[str | None] | None = None,
) -> dict:
    """The answers of one engine."""
    import vllm

    model = vllm.LLM(skip_tokenizer_init=True, **{**engine, **_arguments(flags or [])})
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
        "settings": ", ".join(_settings(model)),
        "drafts": _drafts(model) if model.llm_engine.log_stats else [0, 0],
    }


def _arguments(flags: list[str]) -> dict:
    """The arguments of `vllm.LLM` for command-line arguments, parsed by vLLM's own parser.

    Raises:
        FlagError: the parser does not accept them, or they name another model.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def refuse(message):
        raise FlagError(message)

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.error = refuse
    for action in parser._actions:  # only what was given is returned
        action.default = argparse.SUPPRESS
    given = vars(parser.parse_args(flags))
    if "model" in given:
        refuse("argument --model: it is the export")
    return given


def _settings(model):
    """What decides about the comparison: release, model class, attention backend, and settings of the engine."""
    import vllm

    config = model.llm_engine.vllm_config
    name, backends = model.collective_rpc(_implementation)[0]
    chunks = config.scheduler_config.max_num_batched_tokens
    return (
        f"vLLM {vllm.__version__}",
        name,
        f"attention {' and '.join(backends)}",
        str(config.model_config.dtype).removeprefix("torch."),
        "eager" if config.model_config.enforce_eager else "compiled",
        f"block size {config.cache_config.block_size}",
        f"chunks of {chunks} tokens" if config.scheduler_config.enable_chunked_prefill else "no chunked prefill",
        f"prefix cache {'on' if config.cache_config.enable_prefix_caching else 'off'}",
        f"tensor parallel {config.parallel_config.tensor_parallel_size}",
    )


def _implementation(worker) -> tuple[str, list[str]]:
    """The class of a worker's model, and the backends of its attention layers."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    backends = {each.get_attn_backend().get_name() for each in layers if hasattr(each, "get_attn_backend")}
    return type(worker.get_model()).__name__, sorted(backends)


def _drafts(model) -> list[int]:
    counts = {each.name: each.value for each in model.get_metrics() if hasattr(each, "value")}
    return [counts.get(f"vllm:spec_decode_num_{kind}_tokens", 0) for kind in ("draft", "accepted")]


def _adapter(directory: str | None):
    from vllm.lora.request import LoRARequest

    return directory and LoRARequest(directory, 1 + crc32(directory.encode()) % 2**31, directory)


def _logprobs(output) -> list[float]:
    return [choices[token].logprob for token, choices in zip(output.token_ids, output.logprobs, strict=True)]


if __name__ == "__main__":
    main(*sys.argv[1:])
