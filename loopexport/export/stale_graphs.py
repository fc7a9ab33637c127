"""Does a graph still hold the loop of its export? It is unrolled in the graph, whatever `config.json` says since.

A graph whose name tells its K, such as `model_k8.onnx`, is of that K on purpose; all else of its loop, and the K of any
other graph, has to be that of `config.json`, which users edit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from loopexport.base.checkpoint import CONFIG, read_json
from loopexport.errors import CheckpointError, OnnxError
from loopexport.loop.spec import LoopSpec, make_spec
from loopexport.templates.looped_spec import FIELD_PREFIX

from .check import Check
from .directory import Export
from .onnx_files import options_for, steps_in_name


def loop_change(name: str, made: LoopSpec, now: LoopSpec) -> str:
    """What differs between the loop that a graph was made of and the one of `config.json`; empty where nothing does.

    Args:
        name: of the graph's file.
        made: the graph's loop.
        now: that of the export.
    """
    was, wanted = made.to_config_fields(), now.to_config_fields()
    if steps_in_name(name) == made.steps:
        del was[f"{FIELD_PREFIX}steps"]
    if (made.steps, made.rule, made.step_size) == (now.steps, now.rule, now.step_size):
        del was[f"{FIELD_PREFIX}damping"]  # one may leave to the rule what the other says
    changed = [field for field in was if was[field] != wanted[field]]
    return ", ".join(f"{field} {json.dumps(was[field])} -> {json.dumps(wanted[field])}" for field in changed)


def stale_graphs(export: Export) -> str:
    """What to tell of the first graph that holds another loop than the export; empty where there is none."""
    for name, record in export.manifest.onnx.items():
        changed = "" if record.spec is None else loop_change(name, make_spec(**record.spec), export.spec)
        if changed:
            return explanation(name, export.root, changed)
    return ""


def explanation(name: str, root: Path, changed: str) -> str:
    """What to tell of a graph that is stale, and what to do."""
    command = f"loopexport onnx {root}{options_for(name)}"
    return f"{name}: the graph was made for another loop ({changed}): run `{command}` again"


def check_loops(export: Export) -> list[Check]:
    """One check for all graphs of an export, by what the manifest says of them; none where there are none."""
    count = sum(record.spec is not None for record in export.manifest.onnx.values())
    if not count:
        return []
    stale = stale_graphs(export)
    return [Check("ONNX graphs hold the loop of config.json", not stale, stale or f"{count} compared")]


def refuse_stale(path: Path, metadata: Mapping[str, str]) -> None:
    """Check a graph, by what it says of itself, before it is run.

    Args:
        path: the graph; where no looped config lies beside it, there is nothing that it could differ from.
        metadata: its properties, see `exporting.build_graph`.

    Raises:
        OnnxError: it holds another loop than the config beside it.
    """
    now = _loop_beside(path)
    fields = {key: value for key, value in metadata.items() if key.startswith(FIELD_PREFIX)}
    if now is None or not fields:
        return
    changed = loop_change(path.name, _loop_of_graph(path, fields), now)
    if changed:
        raise OnnxError(explanation(path.name, path.parent, changed))


def _loop_of_graph(path: Path, fields: Mapping[str, str]) -> LoopSpec:
    try:
        return LoopSpec.from_config(SimpleNamespace(**{key: json.loads(value) for key, value in fields.items()}))
    except ValueError as error:  # JSON's own are of that kind
        again = f"`loopexport onnx {path.parent}{options_for(path.name)}`"
        raise OnnxError(f"{path.name} does not tell which loop it holds ({error}): run {again} again") from None


def _loop_beside(path: Path) -> LoopSpec | None:
    if not (path.parent / CONFIG).is_file():
        return None
    try:
        config = read_json(path.parent / CONFIG)
        has_loop = any(key.startswith(FIELD_PREFIX) for key in config)
        return LoopSpec.from_config(SimpleNamespace(**config)) if has_loop else None
    except (CheckpointError, ValueError) as error:
        raise OnnxError(f"{path.parent / CONFIG} holds an impossible loop: {error}") from None
