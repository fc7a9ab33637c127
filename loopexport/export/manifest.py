"""The manifest of an export, `loopexport.json`: its base, its loop, and a record of every file."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import get_args

from loopexport.base.checkpoint import MANIFEST, Origin, read_json
from loopexport.choices import Attention, Weights
from loopexport.errors import CheckpointError, ExportError, SpecError
from loopexport.files.digests import bytes_sha256
from loopexport.files.json_text import json_text
from loopexport.files.links import check_link
from loopexport.loop.spec import LoopSpec, make_spec

from .onnx_files import DTYPES
from .quantisation import Quantisation, read_cost, read_quantisation

FORMAT = 1

IN_PLACE = "in place"  # for weights that `adopt` left where they were

# An id of a model on the Hub, as the Hub defines it.
HUB_ID = re.compile(r"(?!.*(\.\.|--))\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", re.ASCII)
WORD = re.compile(r"[\w.+-]{1,100}", re.ASCII)


@dataclass(frozen=True)
class FileRecord:
    """Size and digests of a file.

    Attributes:
        size: in bytes.
        sha256: of every small file, and of weights if the Hub's cache has it; else None.
        xxh3_128: of copied weights without a sha256, since it is much faster; else None.
        header_sha256: of the header of a weights file; None for other files.
    """

    size: int
    sha256: str | None = None
    xxh3_128: str | None = None
    header_sha256: str | None = None


@dataclass(frozen=True)
class OnnxRecord:
    """A file that the ONNX export wrote. Fields that only graphs have are None for other files.

    Attributes:
        size: in bytes.
        sha256: of a graph or config; None for a data file.
        xxh3_128: of a data file; None for others.
        steps: K of a graph.
        dtype: the dtype that a graph computes in: fp32, fp16 or bf16.
        attention: the attention layout of a graph.
        spec: the loop of a graph, as fields of `LoopSpec`.
        data: names of the files that a graph reads its weights from.
        layout: of a data file: the number of our layout; None in files of earlier releases.
        quantised: how the weights of a graph or a data file are quantised, as fields of `Quantisation`.
        cost: what quantising the weights of a graph costs, as fields of `Cost`; None if it was not measured.
        difference: the largest difference of a graph's logits from torch, as a fraction of the logits' scale, without
            rounded activations; None if they were not compared.
    """

    size: int
    sha256: str | None = None
    xxh3_128: str | None = None
    steps: int | list[int] | None = None
    dtype: str | None = None
    attention: str | None = None
    spec: dict | None = None
    data: tuple[str, ...] | None = None
    layout: int | None = None
    quantised: dict | None = None
    cost: dict | None = None
    difference: float | None = None

    @property
    def steps_text(self) -> str:
        """K of a graph, or one for each span: `3 and 2`."""
        return " and ".join(map(str, self.steps)) if isinstance(self.steps, list) else str(self.steps)

    @property
    def quantisation(self) -> Quantisation | None:
        """How the weights are quantised; None for plain ones."""
        return read_quantisation(self.quantised)

    @property
    def quantised_text(self) -> str:
        """How the weights are quantised, to follow the dtype of the graph; empty for plain ones."""
        return "" if self.quantisation is None else f", weights in {self.quantisation.words}"


@dataclass(frozen=True)
class Manifest:
    """The record that an export keeps of itself.

    Attributes:
        loopexport: version of LoopExport that wrote it.
        base: where the base came from.
        spec: the loop at the time of conversion; the user may have edited `config.json` since.
        weights_method: how the weights were put in place: "reflink", "hardlink" or "copy"; "none" for no weights;
            "in place" for a trained model that was adopted.
        weights: the weights files, by name.
        files: all other files but the manifest itself and the ONNX files, by name.
        left_behind: names of the base's files that were not copied.
        added: names of files that the base does not have, such as the NOTICE that its licence requires.
        trained: whether the weights were trained since the conversion, so that they are not the base's.
        text_only: whether the base was multimodal, and only its language model is here.
        onnx: files of the ONNX export, by name; `loopexport onnx` adds and replaces them after the conversion.
    """

    loopexport: str
    base: Origin
    spec: LoopSpec
    weights_method: str
    weights: dict[str, FileRecord]
    files: dict[str, FileRecord]
    left_behind: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    trained: bool = False
    text_only: bool = False
    onnx: dict[str, OnnxRecord] = field(default_factory=dict)

    @property
    def remedy(self) -> str:
        """How to get an intact export again."""
        return "save the trained model to a new directory and adopt that" if self.trained else "convert the base again"

    @property
    def weights_digest(self) -> str | None:
        """One digest of all weights; None where the sha256 of a file is not known."""
        digests = {name: record.sha256 for name, record in sorted(self.weights.items())}
        return None if None in digests.values() else bytes_sha256(json_text(digests).encode())

    def to_json(self) -> str:
        """The text of the file: one JSON object, with its keys in a fixed order."""
        values = {"format": FORMAT, **asdict(self)}
        for group in ("weights", "files", "onnx"):
            values[group] = {name: _without_none(record) for name, record in sorted(values[group].items())}
        for name in ("trained", "text_only", "onnx"):
            if not values[name]:
                del values[name]
        return json_text(values)  # in ASCII, since a file name need not be valid text


def read_manifest(root: Path) -> Manifest:
    """Read the manifest of the export in `root`.

    Raises:
        ExportError: there is none, or it is damaged or has another format; the message says what to do.
    """
    path = root / MANIFEST
    try:
        path.lstat()
        check_link(root, MANIFEST)
        values = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ExportError(
            f"{root} is not a LoopExport export: it has no {MANIFEST}; give a directory that `loopexport convert` "
            "wrote, or run `loopexport adopt` on a looped model that was trained"
        ) from None
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror}") from None
    except CheckpointError as error:
        raise ExportError(str(error)) from None
    if values.get("format") != FORMAT:
        raise ExportError(f"{path} is not of format {FORMAT}; use the version of LoopExport that wrote it")
    try:
        return Manifest(
            loopexport=_word(values["loopexport"]),
            base=_origin(**values["base"]),
            spec=make_spec(**values["spec"]),
            weights_method=_one_of((*get_args(Weights), IN_PLACE), values["weights_method"]),
            weights={_file_name(name): _record(**record) for name, record in values["weights"].items()},
            files={_file_name(name): _record(**record) for name, record in values["files"].items()},
            left_behind=tuple(_typed(name, str) for name in values["left_behind"]),
            added=tuple(_typed(name, str) for name in values.get("added", ())),
            trained=_typed(values.get("trained", False), bool),
            text_only=_typed(values.get("text_only", False), bool),
            onnx={_file_name(name): _onnx_record(record) for name, record in values.get("onnx", {}).items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError, SpecError) as error:
        raise ExportError(f"{path} is damaged ({error!r}); convert the base again") from None


def _file_name(name: str) -> str:
    """Check that a name stays inside the directory of the export."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or "\\" in name or not name.isprintable():
        raise ValueError(f"{name!r} is not a file name inside an export; do not trust it")
    return name


def _origin(name, revision=None) -> Origin:
    """A base as it may be shown and linked to: its name is one line of text, or a Hub id where there is a commit."""
    if not _typed(name, str).isprintable() or not (revision is None or HUB_ID.fullmatch(name)):
        raise ValueError(f"{name!r} is not the name of a base; do not trust this export")
    return Origin(name, None if revision is None else _word(revision))


def _word(value) -> str:
    if not WORD.fullmatch(_typed(value, str)):
        raise ValueError(f"{value!r} is not a plain word; do not trust this export")
    return value


def _one_of(words: Container[str | None], value):
    if value not in words:
        raise ValueError(f"{value!r} is not one of {words}")
    return value


def _record(size, sha256=None, xxh3_128=None, header_sha256=None) -> FileRecord:
    digests = (_typed(digest, str, type(None)) for digest in (sha256, xxh3_128, header_sha256))
    return FileRecord(_typed(size, int), *digests)


def _onnx_record(values: dict) -> OnnxRecord:
    record = OnnxRecord(**values)
    _typed(record.size, int)
    for text in (record.sha256, record.xxh3_128):
        _typed(text, str, type(None))
    _one_of((None, *DTYPES), record.dtype)
    _one_of((None, *get_args(Attention)), record.attention)
    for steps in record.steps if isinstance(record.steps, list) else [record.steps]:
        _typed(steps, int, type(None))
    _typed(record.difference, float, int, type(None))
    _typed(record.layout, int, type(None))
    read_quantisation(record.quantised)
    read_cost(record.cost)
    if record.spec is not None:
        make_spec(**record.spec)
    data = None if record.data is None else tuple(_file_name(name) for name in record.data)
    return replace(record, data=data)


def _typed(value, *types: type):
    if type(value) not in types:
        raise TypeError(f"{value!r} is not of type {types[0].__name__}")
    return value


def _without_none(record: dict) -> dict:
    return {key: value for key, value in record.items() if value is not None}
