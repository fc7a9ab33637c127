"""Try every family that can be looped: can it be exported to ONNX, and does its graph equal torch?

It uses the tiny bases of `family_walk`, with windows and chunks small enough to matter at the compared lengths.

    PYTHONPATH=tests python -m support.onnx_walk

writes the outcomes into `loopexport/base/families.json`, beside the outcomes of the conversion.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import torch
from transformers.utils import logging

import loopexport
from loopexport.base import families
from support.walk_checks import RELEASE, STEPS, Outcome, WrongError, one_line
from support.walk_configs import save_tiny_family, tiny_family_config

SPANS = ((2, 4), *((start, start + 1) for start in range(6)))
# Values for the fields of these names in every config that has them; SWITCHES turn the windows on.
WINDOWS = {"sliding_window": 4, "attention_chunk_size": 4, "window_size": 4, "floor_scale": 3}
SWITCHES = {"use_sliding_window": True, "max_window_layers": 3}
SPECIAL = {"lfm2": {"layer_types": ["conv", "full_attention"] * 3}}  # as in published checkpoints


def walk_onnx(family: str, directory: Path, **overrides) -> tuple[Outcome, float]:
    """Convert and export one family.

    Args:
        family: its `model_type`.
        directory: where to write; must be empty.
        **overrides: fields of the tiny config.

    Returns:
        The outcome, "works" or "refused", and the largest difference from torch, relative to the logits' scale.

    Raises:
        WrongError: a graph does not equal torch, which is a bug in LoopExport.
    """
    base = save_tiny_family(family, directory / "base", **{**_windows(family), **overrides})
    root = _convert(base, directory / "out")
    try:
        outcome = loopexport.plan_onnx(root).apply()
    except loopexport.LoopExportError as error:
        return Outcome("refused", one_line(error).rpartition(" to ONNX: ")[2]), 0.0
    checks = [check for each in outcome.checks.values() for check in each]
    for check in checks:
        if not check.passed:
            raise WrongError(f"{check.name}: {check.detail}")
    return Outcome("works"), max(check.difference or 0.0 for check in checks)


def _windows(family: str) -> dict:
    """Config fields that make windows matter at the compared lengths, also where the default is None."""
    config = tiny_family_config(family)
    windows = {name: size for name, size in WINDOWS.items() if hasattr(config, name)}
    switches = {name: value for name, value in SWITCHES.items() if hasattr(config, name)}
    return {**windows, **switches, **SPECIAL.get(family, {})}


def _convert(base: Path, out: Path) -> Path:
    """Convert with the first span that is not refused."""
    refusals = []
    for span in SPANS:
        try:
            return loopexport.convert(str(base), out, span=span, steps=STEPS, weights="hardlink").root
        except loopexport.LoopExportError as error:
            refusals.append(error)
    raise refusals[0]


def walked_families() -> list[str]:
    """The text families that work on the installed release, or work in part."""
    records = {family: record for family, record in families.outcomes().items() if families.READS not in record}
    recorded = {family: record.get(RELEASE, "") for family, record in records.items()}
    return [family for family, outcome in recorded.items() if outcome.partition(":")[0] in ("works", "in part")]


def _walked(family: str) -> tuple[str, str]:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        try:
            outcome, difference = walk_onnx(family, Path(directory))
        except Exception as error:  # print it, never record it
            outcome, difference = Outcome("wrong", f"{type(error).__name__}: {one_line(error)}"), 0.0
    print(f"{family}: {outcome} ({difference:.2g}, {time.monotonic() - start:.0f} s)", flush=True)
    return family, str(outcome)


def main() -> None:
    """Write each outcome into `families.json` as soon as it is known, except wrong ones."""
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", help="only these")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    wrong = []
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=20) as pool:
        for family, outcome in pool.imap_unordered(_walked, options.families or walked_families()):
            if outcome.startswith("wrong"):
                wrong.append(family)
            else:
                _record(family, outcome)
    if wrong:
        raise SystemExit(f"wrong: {', '.join(wrong)}")


def _record(family: str, outcome: str) -> None:
    recorded = json.loads(families.FILE.read_text())
    recorded[family][families.ONNX] = outcome
    families.FILE.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
