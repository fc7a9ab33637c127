"""Try a family in MLX: does mlx-lm run a tiny base of it as transformers does, and a loop as exactly?"""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import loopexport
from loopexport.checks.mlx import GROWTH, TOLERANCE, Ran, relative_difference, run_mlx
from loopexport.checks.probe import CHUNKS
from loopexport.templates.looped_mlx_limits import MODEL_FILE
from support.family_walk import walked_families
from support.mlx_bases import save_for_mlx, save_weights_for_mlx
from support.multimodal_walk import MULTIMODAL_FAMILIES
from support.tiny import tiny_tokens
from support.walk_checks import SMALLEST_EFFECT, one_line

LOOSE = 1e-3  # of the logits' scale: mlx-lm approximates an activation, say; what differs more is another model
FROZEN = "frozen routing"
LOOPS = {"shared": {}, "per_step": {"kv": "per_step"}, FROZEN: {"frozen_routing": True, "damping": 1.0}}
# Families with routers, for the last of these loops.
SPARSE = (
    "afmoe", "deepseek_v2", "deepseek_v3", "dots1", "exaone_moe", "glm4_moe", "glm4_moe_lite", "gpt_oss", "granitemoe",
    "laguna", "mellum", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "solar_open",
)  # fmt: skip
# Outcomes of a family, and of a loop on it.
NO_BASE, FAILS, DIFFERS = "no tiny base", "mlx-lm does not load a tiny base", "mlx-lm's base differs"
EXACT, AS_BASE, REFUSED = "exact", "as exact as the base", "refused"
LISTING = """
from pathlib import Path
import mlx_lm.models, mlx_lm.utils
names = {path.stem for path in Path(mlx_lm.models.__path__[0]).glob("*.py")}
print(*names, *mlx_lm.utils.MODEL_REMAPPING)
"""


def common_families(python: str) -> set[str]:
    """The families of both libraries that read text alone."""
    done = subprocess.run([python, "-P", "-c", LISTING], capture_output=True, text=True, check=True)
    return set(done.stdout.split()) & set(walked_families()) - set(MULTIMODAL_FAMILIES)


def walk_mlx(family: str, directory: Path, python: str) -> dict[str, str]:
    """What came of a family: an outcome for each of its loops, or one under "base".

    Raises:
        AssertionError: a loop differs more than mlx-lm's base does, which is a bug in LoopExport.
    """
    loops = {name: loop for name, loop in LOOPS.items() if name != FROZEN or family in SPARSE}
    try:
        base = save_for_mlx(family, directory / "base")
        plain, looped = _logits(base), {}
        for name, loop in loops.items():
            export = loopexport.convert(str(base), directory / name, span=(2, 4), steps=3, weights="copy", **loop).root
            looped[name] = _logits(export)
    except Exception as error:  # a class of transformers may raise anything at a size that it was not made for
        return {"base": NO_BASE, "reason": one_line(error)}
    if family == "gpt_oss":
        for name in loops:
            save_weights_for_mlx(directory / name)
    prompt = {"tokens": tiny_tokens(2, sum(CHUNKS)).tolist(), "chunks": CHUNKS}
    runs = [{**prompt, "model": str(directory / name), "fields": {"model_file": MODEL_FILE}} for name in loops]
    own, *others = run_mlx([_of_base(runs[0]), *runs], python=python)
    if own.error:
        return {"base": FAILS, "reason": one_line(own.error)}
    off = _difference(own, plain)
    if off > LOOSE:
        return {"base": DIFFERS, "reason": f"{off:.1g} of the logits' scale"}
    assert all(relative_difference(each, plain) > SMALLEST_EFFECT for each in looped.values()), "a loop changes nothing"
    return {name: _outcome(ran, looped[name], off) for name, ran in zip(loops, others, strict=True)}


def _of_base(run: dict) -> dict:
    """A run with K = 1."""
    return {**run, "fields": {**run["fields"], "loop_steps": 1}}


def _logits(directory: Path):
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tiny_tokens(2, sum(CHUNKS))).logits.numpy()


def _difference(ran: Ran, theirs) -> float:
    return max(relative_difference(ours, theirs) for ours in (ran.full, ran.cached))


def _outcome(ran: Ran, theirs, off: float) -> str:
    if ran.error:
        return f"{REFUSED}: {one_line(ran.error)}"
    difference = _difference(ran, theirs)
    assert difference <= max(TOLERANCE, GROWTH * off), f"off by {difference:.2g}, the base by {off:.2g}"
    return EXACT if difference <= TOLERANCE else AS_BASE
