"""Compare the logits of the installed mlx-lm with those of transformers. mlx-lm runs in its own process."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from loopexport.errors import ExportError, one_line
from loopexport.export.check import Check
from loopexport.export.directory import Export
from loopexport.export.mlx_plan import plan_mlx

from .probe import CHUNKS, full_logits, text_probe
from .vllm import load_with_transformers

if TYPE_CHECKING:
    import numpy as np

FULL_AS_BY_TRANSFORMERS = "the full forward in MLX equals that of transformers"
CACHED_AS_BY_TRANSFORMERS = "cached chunks and steps in MLX equal that forward"

# Largest |a - b| allowed, relative to the largest |b|, between two libraries that sum in other orders in fp32.
TOLERANCE = 1e-5
# How much larger than in the base the differences may be in a loop, which repeats layers, before they count as wrong.
GROWTH = 10
MAX_REASON_CHARS = 400
ENVIRONMENT = {"PYTHONSAFEPATH": "1"}  # or else the process would import from the working directory


@dataclass(frozen=True)
class Ran:
    """The results of one run.

    Attributes:
        full, cached: the logits of one forward, and of chunks through a cache, `(batch, seq, vocab)`, or None.
        settings: release, device and cache, in words.
        error: what stopped it, or an empty text.
    """

    full: np.ndarray | None
    cached: np.ndarray | None
    settings: str
    error: str


def check_mlx(export: Export, *, python: str = sys.executable) -> list[Check]:
    """Compare MLX with transformers on random tokens, in fp32.

    A check is not proved (`passed` is None) if mlx-lm's own model of the family differs about as much at K = 1.

    Args:
        export: the export.
        python: the interpreter that has mlx-lm.

    Raises:
        ExportError: mlx-lm is not installed, or does not or cannot load the export, or the base is quantised.
    """
    _check_possible(export, python)
    model = load_with_transformers(export.root)
    probe = text_probe(model.config)
    theirs, base = _logits(model, probe), _logits(model, probe, steps=1)
    del model
    gc.collect()
    run = {"model": str(export.root.resolve()), "tokens": probe.tokens.tolist(), "chunks": CHUNKS}
    looped, plain = run_mlx([run, {**run, "fields": {"loop_steps": 1}}], python=python)
    if looped.full is None or looped.cached is None:
        return [Check(FULL_AS_BY_TRANSFORMERS, False, one_line(looped.error, MAX_REASON_CHARS))]
    own = None if plain.full is None else relative_difference(plain.full, base)
    return [
        _compared(FULL_AS_BY_TRANSFORMERS, looped.full, theirs, own, looped.settings),
        _compared(CACHED_AS_BY_TRANSFORMERS, looped.cached, theirs, own, looped.settings),
    ]


def relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest absolute value of `theirs`."""
    return float(abs(ours - theirs).max() / (abs(theirs).max() or 1.0))


def run_mlx(runs: list[dict], *, python: str = sys.executable) -> list[Ran]:
    """Run models one after the other in one process.

    Args:
        runs: the objects of `mlx_worker`'s RUNS.json.
        python: the interpreter that has mlx-lm.
    """
    import numpy as np

    worker = Path(__file__).with_name("mlx_worker.py")
    with tempfile.TemporaryDirectory() as folder:
        asked, outcomes, log = (Path(folder) / name for name in ("runs.json", "outcomes.json", "log"))
        asked.write_text(json.dumps(runs))
        with log.open("w") as output:
            status = subprocess.run(
                [python, "-P", str(worker), str(asked), folder],
                env={**os.environ, **ENVIRONMENT},
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
            ).returncode
        last = log.read_text(errors="replace").strip().rpartition("\n")[2]
        done = json.loads(outcomes.read_text()) if outcomes.exists() else []
        arrays = [dict(np.load(path)) if (path := Path(folder) / f"{n}.npz").exists() else {} for n in range(len(done))]
    done += [{"error": f"mlx-lm's process ended with status {status}: {last}"}] * (len(runs) - len(done))
    arrays += [{}] * (len(runs) - len(arrays))
    return [
        Ran(logits.get("full"), logits.get("cached"), each.get("settings", ""), each.get("error", ""))
        for each, logits in zip(done, arrays, strict=True)
    ]


def _check_possible(export: Export, python: str) -> None:
    if not export.runs_on_mlx:
        plan_mlx(export.root)  # or the command that the next line names would refuse it
        raise ExportError(f"mlx-lm does not load {export.root}; run `loopexport mlx {export.root}` first")
    if export.base.quantisation:
        raise ExportError(
            f"{export.root} is quantised by {export.base.quantisation}, and only plain weights were compared in MLX; "
            "leave --runtime out to check it with transformers"
        )
    if python == sys.executable and find_spec("mlx_lm") is None:
        raise ExportError(
            f"mlx-lm is not installed for {sys.executable}; run `pip install mlx-lm`, or without a Mac "
            '`pip install "mlx[cpu]" mlx-lm`'
        )


def _logits(model, probe, steps: int | None = None) -> np.ndarray:
    import torch

    model.config.loop_steps = steps or model.config.loop_steps
    with torch.no_grad():
        return full_logits(model, probe).numpy()


def _compared(name: str, ours: np.ndarray, theirs: np.ndarray, own: float | None, settings: str) -> Check:
    """One check.

    Args:
        name: of the check.
        ours, theirs: logits of MLX and of transformers.
        own: how far mlx-lm's base is from that of transformers, relative to the logits' scale; None if unknown.
        settings: of the run.
    """
    difference, relative = float(abs(ours - theirs).max()), relative_difference(ours, theirs)
    detail = f"largest difference {difference:.3g}, {relative:.3g} of the logits' scale; {settings}"
    is_near = relative <= TOLERANCE
    if not is_near and own is not None and relative <= GROWTH * own:
        return Check(name, None, f"{detail}; not proved: mlx-lm's base itself is off by {own:.3g}", difference)
    return Check(name, is_near, detail, difference)
