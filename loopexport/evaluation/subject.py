"""The model to evaluate: an export, or a base that need not be converted first."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from loopexport.base.checkpoint import Checkpoint
from loopexport.errors import ExportError
from loopexport.export.base_loop import check_export_options
from loopexport.export.conversion import ConvertPlan, plan_convert
from loopexport.export.directory import Export, is_export, open_export
from loopexport.export.linked import linked_export
from loopexport.export.own_code import foreign_code
from loopexport.loop.spec import LoopSpec


@dataclass(frozen=True)
class Subject:
    """A model with a loop.

    Attributes:
        name: of the model, in words that may be published.
        base: its checkpoint.
        spec: the loop.
        export: the export, or None.
        plan: the conversion of a base, or None.
    """

    name: str
    base: Checkpoint
    spec: LoopSpec
    export: Export | None = None
    plan: ConvertPlan | None = None

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """A directory that loads as an export."""
        if self.plan is None:
            assert self.export is not None
            yield self.export.root
            return
        with linked_export(self.plan) as root:
            yield root


def find_subject(
    model: str | Path,
    loop: LoopSpec | Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    revision: str | None = None,
    without_adapter: bool = False,
    trust_remote_code: bool = False,
    dry_run: bool = False,
) -> Subject:
    """Find a model and its loop.

    Args:
        model: an export, a local base, or a Hub id of a base.
        loop: the loop of a base, as a spec or as its fields; None with an export or a preset.
        preset: the name of a published loop.
        revision: branch, tag or commit of a Hub model.
        without_adapter: ignore a PEFT adapter beside the weights of a base.
        trust_remote_code: run an export's code even if it is not LoopExport's own.
        dry_run: do not download weights.

    Raises:
        LoopExportError: there is no such model, or the loop does not fit it.
    """
    values = _values(loop)
    if not is_export(Path(model).expanduser()):
        with tempfile.TemporaryDirectory() as folder:  # a place for the plan's output, which is never written
            plan = plan_convert(
                model,
                Path(folder) / f"{Path(str(model)).name or 'model'}-looped",
                preset=preset,
                revision=revision,
                without_adapter=without_adapter,
                dry_run=dry_run,
                **values,
            )
        return Subject(plan.base.origin.name, plan.base, plan.spec, plan=plan)
    given = loop if isinstance(loop, LoopSpec) else values
    check_export_options(model, given, preset=preset, revision=revision, without_adapter=without_adapter)
    export = open_export(model)
    if export.lacking:
        raise ExportError(f"{model} has no weights here ({export.lacking[0]}); download them, or convert with weights")
    if not trust_remote_code and (name := foreign_code(export)) is not None:
        raise ExportError(
            f"{name} in {model} is not the installed LoopExport's; read it, then use --trust-remote-code to run it"
        )
    return Subject(export.root.resolve().name, export.base, export.spec, export=export)


def _values(loop: LoopSpec | Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields of a loop that differ from their defaults, as keywords of `plan_convert`."""
    if loop is None:
        return {}
    if not isinstance(loop, LoopSpec):
        return {name: value for name, value in loop.items() if value is not None}
    values = {each.name: getattr(loop, each.name) for each in fields(loop) if getattr(loop, each.name) != each.default}
    # A path has another default of kv, and takes no steps but 1.
    return values if loop.path is None else {**values, "kv": loop.kv, "steps": 1 if loop.is_identity else None}
