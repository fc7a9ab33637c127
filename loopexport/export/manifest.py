"""The manifest of an export, `loopexport.json`: where it came from, its loop, and a digest of every file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath

from loopexport.base.checkpoint import MANIFEST, Origin, read_json
from loopexport.errors import CheckpointError, ExportError, SpecError
from loopexport.files.json_text import json_text
from loopexport.loop.spec import LoopSpec, make_spec

FORMAT = 1


@dataclass(frozen=True)
class FileRecord:
    """What is known of a file.

    Attributes:
        size: in bytes.
        sha256: of all small files; of weights where the Hub's cache tells it.
        xxh3_128: of weights that were copied and have no known sha256; it takes no time beside a copy, sha256 does.
        header_sha256: of the header alone, for weights.
    """

    size: int
    sha256: str | None = None
    xxh3_128: str | None = None
    header_sha256: str | None = None


@dataclass(frozen=True)
class OnnxRecord:
    """What is known of a file that the ONNX export wrote.

    Attributes:
        size: in bytes.
        sha256: of graphs and configs; xxh3_128 of a data file.
        steps, dtype, attention: of a graph, else None: its K, what it computes in, and its attention layout.
        spec: the loop of a graph, as fields of `LoopSpec`.
        data: files that a graph reads its weights from.
        difference: the largest that verification against torch saw, of the logits' scale; None where it did not run.
    """

    size: int
    sha256: str | None = None
    xxh3_128: str | None = None
    steps: int | None = None
    dtype: str | None = None
    attention: str | None = None
    spec: dict | None = None
    data: tuple[str, ...] | None = None
    difference: float | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything that an export knows of itself.

    Attributes:
        loopexport: version of LoopExport that wrote it.
        base: where the base came from.
        spec: the loop as converted; `config.json` may have been edited since.
        weights_method: how the weights were put in place ("reflink", "hardlink" or "copy"); "none": they were not.
        weights, files: weights files and all others, by name; the manifest itself is not among them.
        left_behind: names of the base's files that were not taken along.
        added: names of files that the base does not have, such as a notice that its licence demands.
        onnx: files of the ONNX export, by name; they come after the conversion, and may be made again.
    """

    loopexport: str
    base: Origin
    spec: LoopSpec
    weights_method: str
    weights: dict[str, FileRecord]
    files: dict[str, FileRecord]
    left_behind: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    onnx: dict[str, OnnxRecord] = field(default_factory=dict)

    def to_json(self) -> str:
        """The manifest as it is written: one JSON object, keys in a fixed order."""
        values = {"format": FORMAT, **asdict(self)}
        for group in ("weights", "files", "onnx"):
            values[group] = {name: _without_none(record) for name, record in sorted(values[group].items())}
        if not self.onnx:
            del values["onnx"]
        return json_text(values)  # in ASCII: names of files need not be text


def read_manifest(root: Path) -> Manifest:
    """The manifest of the export in `root`.

    Raises:
        ExportError: there is none, or it is damaged or of a newer format.
    """
    path = root / MANIFEST
    try:
        path.lstat()
        values = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ExportError(
            f"{root} is not a LoopExport export: it has no {MANIFEST}; give a directory that `loopexport convert` wrote"
        ) from None
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror}") from None
    except CheckpointError as error:
        raise ExportError(str(error)) from None
    if values.get("format") != FORMAT:
        raise ExportError(f"{path} is not of format {FORMAT}; it takes another version of LoopExport")
    try:
        return Manifest(
            loopexport=_typed(values["loopexport"], str),
            base=_origin(**values["base"]),
            spec=make_spec(**values["spec"]),
            weights_method=_typed(values["weights_method"], str),
            weights={_file_name(name): _record(**record) for name, record in values["weights"].items()},
            files={_file_name(name): _record(**record) for name, record in values["files"].items()},
            left_behind=tuple(_typed(name, str) for name in values["left_behind"]),
            added=tuple(_typed(name, str) for name in values.get("added", ())),
            onnx={_file_name(name): _onnx_record(record) for name, record in values.get("onnx", {}).items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError, SpecError) as error:
        raise ExportError(f"{path} is damaged: {error!r}") from None


def _file_name(name: str) -> str:
    """A name that stays inside the directory that it is looked up in, or written to."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or "\\" in name or not name.isprintable():
        raise ValueError(f"{name!r} is not the name of a file of an export; do not trust it")
    return name


def _origin(name, revision=None) -> Origin:
    return Origin(_typed(name, str), _typed(revision, str, type(None)))


def _record(size, sha256=None, xxh3_128=None, header_sha256=None) -> FileRecord:
    digests = (_typed(digest, str, type(None)) for digest in (sha256, xxh3_128, header_sha256))
    return FileRecord(_typed(size, int), *digests)


def _onnx_record(values: dict) -> OnnxRecord:
    record = OnnxRecord(**values)
    _typed(record.size, int)
    for text in (record.sha256, record.xxh3_128, record.dtype, record.attention):
        _typed(text, str, type(None))
    _typed(record.steps, int, type(None))
    _typed(record.difference, float, int, type(None))
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
