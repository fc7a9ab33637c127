"""Find ONNX graphs that contain another loop than the current `config.json`.

The loop is unrolled in a graph, so editing `config.json` makes the graph stale. A graph with K in its name, such as
`model_k8.onnx`, keeps that K on purpose; the other fields of its loop must still match.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from loopexport.base.checkpoint import CONFIG, read_json
from loopexport.errors import CheckpointError, OnnxError
from loopexport.loop.spec import LoopSpec, Steps, make_spec
from loopexport.templates.looped_spec import FIELD_PREFIX

from .check import Check
from .directory import Export
from .onnx_files import options_for, steps_in_name
from .quantisation import Quantisation, read_quantisation


def loop_difference(name: str, made: LoopSpec, now: LoopSpec) -> str:
    """The fields that differ between the loop of a graph and the loop of its export, such as `loop_steps 4 -> 6`.

    Args:
        name: the file name of the graph.
        made: the loop in the graph.
        now: the loop in the export's `config.json`.
    """
    was, wanted = made.to_config_fields(), now.to_config_fields()
    fields = {**was, **wanted}
    if steps_in_name(name) == made.steps:
        del fields[f"{FIELD_PREFIX}steps"]
    if (made.steps, made.rule, made.step_size) == (now.steps, now.rule, now.step_size):
        del fields[f"{FIELD_PREFIX}damping"]  # equal, even if one of them leaves it to the default
    changed = {field: (was.get(field), wanted.get(field)) for field in fields}
    return ", ".join(
        f"{field} {json.dumps(old)} -> {json.dumps(new)}" for field, (old, new) in changed.items() if old != new
    )


def stale_graphs(export: Export) -> str:
    """The error message for the first stale graph of an export; empty if there is none."""
    for name, record in export.manifest.onnx.items():
        changed = "" if record.spec is None else loop_difference(name, make_spec(**record.spec), export.spec)
        if changed:
            return stale_message(name, export.root, changed, export.spec.steps, record.quantisation)
    return ""


def stale_message(name: str, root: Path, changed: str, own_steps: Steps, quantisation: Quantisation | None) -> str:
    """The error message for a stale graph.

    Args:
        name: the file name of the graph.
        root: its export.
        changed: the result of `loop_difference`.
        own_steps: K of the export.
        quantisation: of the graph's weights.
    """
    command = f"`loopexport onnx {root}{options_for(name, quantisation)}`"
    # The graph of the export's own K has no K in its name, so no command writes this one again.
    remedy = f"delete it, and run {command}" if steps_in_name(name) == own_steps else f"run {command} again"
    return f"{name}: the graph contains another loop ({changed}): {remedy}"


def check_loops(export: Export) -> list[Check]:
    """One check that no graph of an export is stale, based on the manifest; no check without graphs."""
    count = sum(record.spec is not None for record in export.manifest.onnx.values())
    if not count:
        return []
    stale = stale_graphs(export)
    return [Check("ONNX graphs hold the loop of config.json", not stale, stale or f"{count} compared")]


def refuse_stale(path: Path, metadata: Mapping[str, str]) -> None:
    """Check a graph before it runs: its metadata must match the `config.json` next to it.

    Args:
        path: the graph; without a looped `config.json` next to it, any graph passes.
        metadata: the graph's metadata properties, which the ONNX export wrote.

    Raises:
        OnnxError: the graph is stale; the message has the command that exports it again.
    """
    now = _loop_beside(path)
    fields = {key: value for key, value in metadata.items() if key.startswith(FIELD_PREFIX)}
    if now is None or not fields:
        return
    changed = loop_difference(path.name, _loop_of_graph(path, fields), now)
    if changed:
        raise OnnxError(stale_message(path.name, path.parent, changed, now.steps, _quantisation_of(metadata)))


def _quantisation_of(metadata: Mapping[str, str]) -> Quantisation | None:
    try:
        return read_quantisation(json.loads(metadata.get("quantised", "null")))
    except (TypeError, ValueError):
        return None


def _loop_of_graph(path: Path, fields: Mapping[str, str]) -> LoopSpec:
    try:
        return LoopSpec.from_config(SimpleNamespace(**{key: json.loads(value) for key, value in fields.items()}))
    except ValueError as error:  # includes errors of JSON
        again = f"`loopexport onnx {path.parent}{options_for(path.name)}`"
        raise OnnxError(f"{path.name} has a damaged loop in its metadata ({error}): run {again} again") from None


def _loop_beside(path: Path) -> LoopSpec | None:
    if not (path.parent / CONFIG).is_file():
        return None
    try:
        config = read_json(path.parent / CONFIG)
        has_loop = any(key.startswith(FIELD_PREFIX) for key in config)
        return LoopSpec.from_config(SimpleNamespace(**config)) if has_loop else None
    except (CheckpointError, ValueError) as error:
        raise OnnxError(f"{path.parent / CONFIG} holds an impossible loop: {error}") from None
