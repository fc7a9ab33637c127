"""Try every family of language models in the installed transformers: can it be looped, and is the loop exact?

For each family, make a tiny random base, convert it, load it, and check what holds for every family: no missing or
unexpected keys; one step is bitwise the base; a full forward under `per_step` equals a replay of the base's own layers
by hand; cached decoding equals a full forward; gradient checkpointing changes no gradient. Multimodal families are
prompted with images or sounds: `support.multimodal_walk`.

    PYTHONPATH=tests python -m support.family_walk

writes the outcomes into `loopexport/base/families.json`, the source of the families table and of `convert`'s refusals.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

import loopexport
from loopexport.base import families
from support.multimodal_walk import MULTIMODAL_FAMILIES, reads, walk_multimodal
from support.walk_checks import RELEASE, Outcome, check_exact, one_line, try_spans, why_base_cannot_decode
from support.walk_configs import save_base, save_tiny_family, tiny_family_config

__all__ = ["RELEASE", "check_exact", "save_tiny_family", "tiny_family_config", "walk", "why_base_cannot_decode"]


def walk(family: str, directory: Path) -> Outcome:
    """Try one family; `directory` must be empty.

    Raises:
        WrongError: the export is not exact, which is a bug in LoopExport.
    """
    if family in MULTIMODAL_FAMILIES:
        return walk_multimodal(family, directory)
    try:
        config = tiny_family_config(family)
        refusal = _why_refused(family, config)
        if refusal:
            return Outcome("refused", refusal)
        base = save_base(config, directory / "base")
    except Exception as error:  # a class of transformers may raise anything at a size that it was not made for
        return Outcome("untried", one_line(error))
    try:
        return try_spans(base, directory)
    except Exception:  # our bug, unless the base itself fails too
        reason = why_base_cannot_decode(base)
        if reason:
            return Outcome("untried", reason)
        raise


def _why_refused(family: str, config) -> str:
    """Why the family is refused for its `config.json` alone; empty if it is not."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    values = {**config.to_dict(), "architectures": [name if isinstance(name, str) else name[0]]}
    try:
        families.check_family(values)
    except loopexport.LoopExportError as error:
        return one_line(error)
    return ""


def walked_families() -> list[str]:
    """All families of the installed transformers that generate text."""
    return list(dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MULTIMODAL_FAMILIES]))


def _walked(family: str) -> str:
    """The outcome as it is recorded; recorded refusals are ignored. A wrong export comes out as "wrong: why"."""
    start = time.monotonic()
    with mock.patch.object(families, "outcomes", return_value={}), tempfile.TemporaryDirectory() as directory:
        try:
            outcome = walk(family, Path(directory))
        except Exception as error:  # print it, never record it
            outcome = Outcome("wrong", f"{type(error).__name__}: {one_line(error)}")
    print(f"{family}: {outcome} ({time.monotonic() - start:.1f} s)", flush=True)
    return str(outcome)


def main() -> None:
    """Write each outcome on the installed release into `families.json` as soon as it is known, except wrong ones."""
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", help="only these")
    parser.add_argument("--resume", action="store_true", help="only families without an outcome on this release")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    if not options.families and not options.resume:
        _forget()
    todo = [each for each in options.families or walked_families() if not (options.resume and _is_recorded(each))]
    start, wrong = time.monotonic(), []
    for family in todo:
        outcome = _walked(family)
        if outcome.startswith("wrong"):
            wrong.append(family)
        else:
            _record(family, outcome)
    print(f"{len(todo)} families in {time.monotonic() - start:.0f} s")
    if wrong:
        raise SystemExit(f"wrong: {', '.join(wrong)}")


def _recorded() -> dict[str, dict[str, str]]:
    return json.loads(families.FILE.read_text()) if families.FILE.exists() else {}


def _is_recorded(family: str) -> bool:
    return RELEASE in _recorded().get(family, {})


def _forget() -> None:
    """Remove the outcomes on the installed release; keep those on other releases."""
    recorded = _recorded()
    for record in recorded.values():
        record.pop(RELEASE, None)
    _write(recorded)


def _record(family: str, outcome: str) -> None:
    recorded = _recorded()
    recorded.setdefault(family, {})[RELEASE] = outcome
    if family in MULTIMODAL_FAMILIES:
        recorded[family][families.READS] = reads(family)
    _write(recorded)


def _write(recorded: dict[str, dict[str, str]]) -> None:
    tried = {family: record for family, record in recorded.items() if record.keys() - {families.READS}}
    kept = {family: dict(sorted(record.items())) for family, record in sorted(tried.items())}
    families.FILE.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
