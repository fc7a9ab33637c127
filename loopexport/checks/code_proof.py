"""`upgrade`: bring the code of an export up to date, after a proof that it computes the same."""

from __future__ import annotations

import gc
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loopexport._keywords import suggest_keywords
from loopexport.base.auto_class import auto_class
from loopexport.base.checkpoint import CONFIG, INDEX
from loopexport.errors import ExportError, first_line
from loopexport.export.code_upgrade import UpgradePlan, plan_upgrade, write_code
from loopexport.export.directory import Export
from loopexport.export.own_code import code_files, template_bytes
from loopexport.templates import FILES as TEMPLATES

from .probe import cached_logits, full_logits, text_probe
from .verification import TOLERANCE

if TYPE_CHECKING:
    import torch

# A loop to try the code with where the export's own does nothing.
ACTIVE_LOOP = {
    "loop_steps": 2,
    "loop_anchor": 0.0,
    "loop_rule": "euler",
    "loop_schedule": None,
    "loop_momentum": None,
    "loop_history": None,
}


@dataclass(frozen=True)
class UpgradeResult:
    """The result of an upgrade.

    Attributes:
        plan: which code files changed; none if the export had today's code already.
        difference: the largest difference of the logits under the new code, as a fraction of their scale; None if there
            was nothing to compare.
        is_card_new: whether the card was regenerated; False if someone had edited it, or if nothing changed.
    """

    plan: UpgradePlan
    difference: float | None = None
    is_card_new: bool = False

    def to_dict(self) -> dict:
        """The result for `--json`."""
        written = not self.plan.is_current
        return {**self.plan.to_dict(), "written": written, "difference": self.difference, "card": self.is_card_new}


@suggest_keywords
def upgrade(root: str | Path) -> UpgradeResult:
    """Replace the code files of an export by today's: `apply_upgrade(plan_upgrade(root))`.

    Args:
        root: the export.

    Raises:
        ExportError: the export cannot be upgraded, or would compute something else; nothing was changed.
        OutputError: the directory cannot be written.
    """
    return apply_upgrade(plan_upgrade(root))


def apply_upgrade(plan: UpgradePlan) -> UpgradeResult:
    """Run the export with its own code and with today's, on the CPU, and then replace the code.

    Raises:
        ExportError: the logits differ by more than rounding, or the export does not run here; nothing was changed.
        OutputError: the directory cannot be written.
    """
    if plan.is_current:
        return UpgradeResult(plan)
    difference = _code_difference(plan.export)
    if not difference <= TOLERANCE:  # also if it is not a number
        raise ExportError(
            f"with today's code the logits of {plan.export.root} differ by {difference:.3g} of their scale, and "
            f"{TOLERANCE:g} is allowed; nothing was changed: keep the export as it is, or convert the base again"
        )
    return UpgradeResult(plan, difference, write_code(plan))


def _code_difference(export: Export) -> float:
    """The largest difference of the logits under the export's own code and today's, as a fraction of their scale."""
    before = {name: (export.root / name).read_bytes() for name in code_files(export.root)}
    after = {name: template_bytes(name) for name in TEMPLATES}
    try:
        theirs = _logits(export, before)
    except Exception as error:  # old code may fail in any way on a new transformers
        raise ExportError(
            f"{export.root} does not run here with its own code ({type(error).__name__}: {first_line(error)}), so "
            "nothing can be compared; upgrade it where it runs, or `loopexport restore` its base and convert that"
        ) from error
    ours = _logits(export, after)
    scale = theirs.abs().max().item() or 1.0
    difference = (ours - theirs).abs().max().item() / scale
    return difference if math.isfinite(difference) else math.inf


def _logits(export: Export, code: dict[str, bytes]) -> torch.Tensor:
    """Logits of a full forward and of cached decoding, `(2 * batch, seq, vocab)`, of random tokens."""
    import torch

    load = auto_class(export.base.config).from_pretrained
    dtype = "auto" if export.base.quantisation else torch.float32
    options = ACTIVE_LOOP if export.spec.is_identity else {}
    with _copy_with(export, code) as root, torch.no_grad():
        model = load(root, trust_remote_code=True, dtype=dtype, **options)
        probe = text_probe(model.config)
        logits = torch.cat([full_logits(model, probe), cached_logits(model, probe, probe.steps)])
        del model
        gc.collect()
        return logits.float()


@contextmanager
def _copy_with(export: Export, code: dict[str, bytes]) -> Iterator[Path]:
    """A copy of an export with this code and with links to its weights.

    Each copy has another name: transformers 4 caches code by the name of the directory.
    """
    with tempfile.TemporaryDirectory(prefix="loopexport_") as folder:
        root = Path(folder)
        for name, content in code.items():
            (root / name).write_bytes(content)
        (root / CONFIG).write_bytes((export.root / CONFIG).read_bytes())
        index = [INDEX] if export.base.index_name else []
        for name in (*index, *export.manifest.weights):
            os.symlink(os.path.realpath(export.root / name), root / name)
        yield root
