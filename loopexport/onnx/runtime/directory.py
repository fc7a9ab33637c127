"""What a directory with an ONNX export says: its graphs, its config, and the tokens that end an answer."""

from __future__ import annotations

from pathlib import Path

from loopexport.base.checkpoint import CONFIG, read_json
from loopexport.errors import CheckpointError, OnnxError
from loopexport.export.onnx_files import graph_name
from loopexport.files.links import check_no_special_file

_GENERATION = "generation_config.json"


def find_graph(root: Path, file: str | None) -> Path:
    """The path of a graph.

    Args:
        root: the directory.
        file: the graph's name; None for `model.onnx`, or for the only graph.

    Raises:
        OnnxError: there is no such graph, or there are several to choose from.
    """
    try:
        check_no_special_file(root)
    except CheckpointError as error:
        raise OnnxError(str(error)) from None
    graphs = sorted(path.name for path in root.glob("*.onnx") if not path.name.startswith("."))
    if file is not None:
        if (root / file).is_file():
            return root / file
        raise OnnxError(f"no {file} in {root}; there are {', '.join(graphs) or 'none'}")
    own = graph_name(1, 1)
    if own in graphs or len(graphs) == 1:
        return root / (own if own in graphs else graphs[0])
    if not graphs:
        raise OnnxError(f"no ONNX graph in {root}; run `loopexport onnx {root}` first")
    raise OnnxError(f"{root} has several graphs, choose one: {', '.join(graphs)}")


def read_config(root: Path) -> dict:
    """`config.json`; empty if there is none.

    Raises:
        OnnxError: it is broken.
    """
    return _read_json(root / CONFIG) if (root / CONFIG).is_file() else {}


def find_end_tokens(root: Path) -> tuple[int, ...]:
    """Tokens that end an answer: those of `generation_config.json`; without that file, those of `config.json`.

    Raises:
        OnnxError: they are no token ids.
    """
    path = root / _GENERATION
    value = (_read_json(path) if path.is_file() else read_config(root)).get("eos_token_id")
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(each, int) for each in ids):
        place = path if path.is_file() else root / CONFIG
        raise OnnxError(f"{place} has eos_token_id {value!r}, which is neither a token id nor a list of token ids")
    return ids


def _read_json(path: Path) -> dict:
    try:
        return read_json(path)
    except CheckpointError as error:
        raise OnnxError(str(error)) from None
