"""The slices of a mergekit config, as a path through the layers of one model.

Source: mergekit's `config.py` for the keys, `merge_methods/passthrough.py` for what a passthrough merge computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopexport.base.checkpoint import Checkpoint
from loopexport.errors import SpecError
from loopexport.files.yaml_text import SpecLoader, load_yaml

from .cost import dtype_name
from .path import Run

MERGE_FIRST = "run mergekit, and convert what it writes"
PASSTHROUGH = "passthrough"
EXAMPLE = "slices: [{sources: [{model: NAME, layer_range: [0, 15]}]}, ...] and merge_method: passthrough"

# Keys with which a merge computes something else than repeated layers, and what to do instead.
REFUSED = {
    "modules": "give the slices of its text decoder at the top level",
    "models": f"write {EXAMPLE}",
    "parameters": "a loop runs weights as they are, without scale: write it as --span with --damping to weaken "
    f"repeats, or {MERGE_FIRST}",
    "residual_weight": f"remove it, or {MERGE_FIRST}",
    "tokenizer": f"an export keeps the base's tokenizer: remove the key, or {MERGE_FIRST}",
    "chat_template": f"an export keeps the base's tokenizer: remove the key, or {MERGE_FIRST}",
}
ALLOWED = ("slices", "merge_method", "base_model", "dtype", "out_dtype", "tokenizer_source", "name")
ALLOWED_IN_SLICE = ("sources", "base_model", "residual_weight", "parameters")
ALLOWED_IN_SOURCE = ("model", "layer_range", "parameters")
DTYPES = ("bfloat16", "float16", "float32", "float64", "int64")
# Values under which the result has the tokenizer of the one model.
OWN_TOKENIZER = (None, "base", "union")


@dataclass(frozen=True)
class Slices:
    """A passthrough merge of one model.

    Attributes:
        file: the config.
        model: the model as the config names it.
        path: the layers that the merged model runs, as half-open runs.
        dtype: the dtype of the merged weights; None for the model's own.
        unknown: keys of the config, its slices and their sources that mergekit does not know, with their place.
    """

    file: str
    model: str
    path: tuple[Run, ...]
    dtype: str | None
    unknown: tuple[str, ...]

    def warnings(self, base: Checkpoint, model: str) -> Iterator[str]:
        """Where the export of a base differs from the merge, one line each; `model` is the base as the user named it.

        A path in `model` may lead to the same directory by another spelling.
        """
        if not _is_same(self.model, model):
            yield f"{self.file} has slices of {self.model}; they are taken as slices of {model}"
        own = dtype_name(base)
        if self.dtype not in (None, own):
            yield f"{self.file} asks for {self.dtype}; the export keeps the weights as they are, in {own}"
        if self.unknown:
            yield f"{self.file} has keys that mergekit does not know: {', '.join(self.unknown)}"


def read_mergekit(file: str | Path) -> Slices:
    """Read a mergekit config that repeats layers of one model, or leaves some out.

    Raises:
        SpecError: it is no such config; the message names what a loop cannot do, and what to do instead.
    """
    if not isinstance(file, (str, Path)) or not str(file):
        raise SpecError(f"from_mergekit {file!r} is not a file; give the path of a mergekit config")
    try:
        config = load_yaml(Path(file).read_text(encoding="utf-8"), SpecLoader)
    except OSError as error:
        raise SpecError(f"cannot read mergekit config {file}: {error.strerror}") from None
    except ValueError as error:
        raise SpecError(f"mergekit config {file} is not YAML: {error}") from None
    try:
        return _slices(str(file), config)
    except SpecError as error:
        raise SpecError(f"mergekit config {file}: {error}") from None


def _slices(file: str, config) -> Slices:
    if not isinstance(config, dict) or not {"slices", "merge_method", "models", "modules"} & config.keys():
        raise SpecError(f"this is no mergekit config; write {EXAMPLE}")
    _check_method(config)
    _check_keys(config, "")
    parts = [_Slice.of(part, f"slice {number}") for number, part in enumerate(_list(config, "slices"), start=1)]
    models = tuple(dict.fromkeys(part.model for part in parts))
    if len(models) > 1:
        raise SpecError(f"it takes layers of {len(models)} models, {models[0]} and {models[1]}; a loop has one model: "
                        f"{MERGE_FIRST}")  # fmt: skip
    _check_base_model(config, models[0], "")
    _check_tokenizer(config.get("tokenizer_source"), models[0])
    dtypes = [_dtype(config.get(key), key) for key in ("out_dtype", "dtype")]
    unknown = (*_unknown(config, (*ALLOWED, *REFUSED), ""), *(key for part in parts for key in part.unknown))
    return Slices(file, models[0], tuple(part.run for part in parts), dtypes[0] or dtypes[1], unknown)


@dataclass(frozen=True)
class _Slice:
    model: str
    run: Run
    unknown: tuple[str, ...]

    @classmethod
    def of(cls, part, where: str) -> _Slice:
        """Read one entry of `slices`."""
        sources = _list(part, "sources", where)
        if len(sources) != 1:
            raise SpecError(f"{where} merges {len(sources)} sources; a loop runs weights as they are: {MERGE_FIRST}")
        source = sources[0]
        if not isinstance(source, dict):
            raise SpecError(f"the source of {where} is {source!r}; write {EXAMPLE}")
        for each in (part, source):
            _check_keys(each, f" in {where}")
        model = _model(source.get("model"), where)
        _check_base_model(part, model, f" in {where}")
        in_slice = _unknown(part, ALLOWED_IN_SLICE, f" in {where}")
        in_source = _unknown(source, ALLOWED_IN_SOURCE, f" in the source of {where}")
        return cls(model, _run(source.get("layer_range"), where), (*in_slice, *in_source))


def _unknown(values: dict, allowed: tuple[str, ...], where: str) -> tuple[str, ...]:
    return tuple(f"{key}{where}" for key in values if key not in allowed)


def _check_method(config: dict) -> None:
    method = config.get("merge_method")
    if method is None:
        raise SpecError("it has no merge_method; write merge_method: passthrough")
    if isinstance(method, str) and method != PASSTHROUGH and method.strip().lower() == PASSTHROUGH:
        raise SpecError(f"merge_method {method!r} is not a spelling that mergekit knows; write {PASSTHROUGH}")
    if method != PASSTHROUGH:
        raise SpecError(
            f"merge_method {method!r} makes new weights; a loop runs weights as they are, as {PASSTHROUGH} does: "
            f"{MERGE_FIRST}"
        )


def _check_base_model(values: dict, model: str, where: str) -> None:
    """Refuse another base model than that of the slices; passthrough does not read it."""
    named = None if values.get("base_model") is None else _model(values["base_model"], f"base_model{where}")
    if named not in (None, model):
        raise SpecError(
            f"base_model{where} is {named}, and the layers are of {model}; remove base_model, or name {model}"
        )


def _dtype(value, key: str) -> str | None:
    """A dtype by its name; None if none is given."""
    if not value:
        return None
    if not isinstance(value, str) or value.removeprefix("torch.") not in DTYPES:
        raise SpecError(f"{key} {value!r} is not one that mergekit knows: {', '.join(DTYPES)}; correct or remove it")
    return value.removeprefix("torch.")


def _check_keys(values: dict, where: str) -> None:
    for key, remedy in REFUSED.items():
        if values.get(key) not in (None, {}, []):
            raise SpecError(f"{_name(key, values[key])}{where} cannot be a loop; {remedy}")


def _name(key: str, value: Any) -> str:
    """A key, with the name of its first entry."""
    return f"{key} ({', '.join(map(str, value))})" if key == "parameters" and isinstance(value, dict) else key


def _check_tokenizer(source, model: str) -> None:
    if source not in OWN_TOKENIZER and _model(source, "tokenizer_source") != model:
        raise SpecError(
            f"tokenizer_source {source!r} is another tokenizer than that of {model}; remove the key, or {MERGE_FIRST}"
        )


def _list(values, key: str, where: str = "it") -> list:
    found = values.get(key) if isinstance(values, dict) else None
    if not isinstance(found, list) or not found:
        raise SpecError(f"{where} has no list of {key}; write {EXAMPLE}")
    return found


def _model(value, where: str) -> str:
    """The model of a reference, which is `NAME`, `NAME@REVISION`, `NAME+LORA`, or a mapping."""
    lora, architecture, model = None, None, value
    if isinstance(value, dict):
        lora, architecture, model = value.get("lora"), value.get("override_architecture"), value.get("model")
        model = f"{model.get('path')}@{model.get('revision')}" if isinstance(model, dict) else model
    if not isinstance(model, str) or not model:
        raise SpecError(f"{where} names no model, but {value!r}; write model: NAME")
    name, plus, adapter = model.partition("+")
    if lora is not None or plus:
        raise SpecError(f"{where} adds LoRA {adapter or lora} to {name}; merge it into the weights, and convert those")
    if architecture is not None:
        raise SpecError(f"{where} has override_architecture {architecture!r}; an export keeps the base's: remove it")
    return name.removesuffix("@None")


def _run(value, where: str) -> Run:
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(type(bound) is int for bound in value)
    if not is_pair or not 0 <= value[0] < value[1]:
        raise SpecError(f"layer_range {value!r} of {where} is not [START, STOP] with 0 <= START < STOP (half-open)")
    return value[0], value[1]


def _is_same(one: str, other: str) -> bool:
    """Whether two names of a model are the same, or two paths lead to one directory."""
    if one == other:
        return True
    paths = (Path(one).expanduser(), Path(other).expanduser())
    try:
        return all(path.exists() for path in paths) and paths[0].samefile(paths[1])
    except (OSError, ValueError):
        return False
