"""Read a base checkpoint: which files it has, what its config says, and what its weights are, without loading them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from .errors import CheckpointError
from .families import check_family, layer_count
from .safetensors_header import Header, Tensor, read_header

CONFIG = "config.json"
CARD = "README.md"
INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

LICENCE_TEXT = re.compile(r"(?i:(licen[cs]e|notice|copying|use_policy|usage_policy)([._-][\w.-]*)?)")

# The small files that an export carries, by name. Everything else stays behind: foreign code, pickles, secrets.
CARRIED = re.compile(
    rf"""
      generation_config\.json
    | (tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|tekken)\.json
    | (tokenizer|sentencepiece|spiece)(\.bpe)?\.model | merges\.txt | vocab\.txt | [\w.-]+\.tiktoken
    | chat_template\.(jinja|json) | additional_chat_templates/[\w.-]+\.jinja
    | {LICENCE_TEXT.pattern}
    """,
    re.VERBOSE,
)

# Weights in other formats, and how to come by safetensors from each.
FOREIGN_WEIGHTS = {
    ".gguf": "load it with transformers (`from_pretrained(dir, gguf_file=...)`) and `save_pretrained` it",
    ".bin": "load it with transformers and `save_pretrained` it",
    ".pt": "load it with transformers and `save_pretrained` it",
    ".pth": "load it with transformers and `save_pretrained` it",
    ".h5": "load it with transformers and `save_pretrained` it",
}

# Parameters of layers whose memory is more than a K/V cache: state spaces, linear attention, convolutions, indexers.
RECURRENT_TENSOR = re.compile(r"\.(A_log|conv_?1d|conv\.conv|rg_lru|time_decay|linear_attn|indexer)\b")

LAYER_TENSOR = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Shard:
    """One weights file.

    Attributes:
        name: its name in the checkpoint.
        path: the real file behind it, all links resolved; it need not exist where only a plan is wanted.
        sha256: of the whole file where it is known for free (the Hub cache names blobs by it), else None.
    """

    name: str
    path: Path
    size: int
    header: Header
    sha256: str | None = None


@dataclass(frozen=True)
class Origin:
    """Where a base came from, as far as it can be told to others: never an absolute path.

    Attributes:
        name: a Hub id, or the name of a local directory.
        revision: the Hub commit, 40 hex digits; None for a local directory.
    """

    name: str
    revision: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A decoder-only causal language model on disk, checked.

    Attributes:
        root: its directory.
        config: `config.json`, parsed.
        shards: its weights files, in the index's order.
        carried: names of the small files that an export takes along, sorted.
        left_behind: names of those that it does not, sorted.
    """

    root: Path
    origin: Origin
    config: dict
    shards: tuple[Shard, ...]
    carried: tuple[str, ...]
    left_behind: tuple[str, ...] = field(default=())

    @property
    def model_type(self) -> str:
        """The base's `model_type`, such as `qwen3`."""
        return self.config["model_type"]

    @property
    def num_layers(self) -> int:
        """L, the number of decoder layers."""
        count = layer_count(self.config)
        assert count is not None, "check_family has seen to it"
        return count

    @property
    def index_name(self) -> str | None:
        """Name of the weights index, or None for a single-file checkpoint."""
        return INDEX if INDEX in self.carried else None

    @property
    def weight_bytes(self) -> int:
        """Size of all weights files together."""
        return sum(shard.size for shard in self.shards)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {name: tensor for shard in self.shards for name, tensor in shard.header.tensors.items()}

    @cached_property
    def layer_params(self) -> dict[int, int]:
        """Number of parameters of each decoder layer, by layer number."""
        params: dict[int, int] = {}
        for name, tensor in self.tensors.items():
            match = LAYER_TENSOR.search(name)
            if match:
                layer = int(match[1])
                params[layer] = params.get(layer, 0) + tensor.num_elements
        return params

    @cached_property
    def recurrent_tensors(self) -> dict[int, str]:
        """By layer number, a tensor that shows the layer to keep more of the past than keys and values."""
        found = {}
        for name in self.tensors:
            layer = LAYER_TENSOR.search(name)
            if layer and RECURRENT_TENSOR.search(name):
                found[int(layer[1])] = name
        return found


def open_checkpoint(
    root: Path,
    origin: Origin | None = None,
    names: set[str] | None = None,
    read_shard: Callable[[Path, str], Shard] | None = None,
    config_path: Path | None = None,
) -> Checkpoint:
    """Read and check the checkpoint in a directory; every error is found before anything is written.

    Args:
        root: the directory, with at least `config.json` and, for several shards, their index.
        origin: what to call it; None names it after the directory.
        names: the files that the checkpoint has, where `root` does not hold all of them (yet).
        read_shard: how to come by a shard, given `root` and a name; None reads it from `root`.
        config_path: the config, where it is not `config.json` of `root`.

    Raises:
        CheckpointError: it cannot be read, or is not a model that can be looped; the message says which and why.
    """
    names = _file_names(root) if names is None else names
    config = _read_config(config_path or root / CONFIG)
    check_family(config)
    shards = _read_shards(root, names, read_shard or read_local_shard)
    _check_causal(config, shards)
    weights = {shard.name for shard in shards}
    carried = {name for name in names if CARRIED.fullmatch(name)}
    if SINGLE_FILE not in weights:
        carried.add(INDEX)
    return Checkpoint(
        root=root,
        origin=origin or Origin(root.resolve().name),
        config=config,
        shards=shards,
        carried=tuple(sorted(carried)),
        left_behind=tuple(sorted(names - carried - weights - {CONFIG, CARD})),
    )


def read_json(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
        CheckpointError: there is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no {path.name} in {path.parent}; is it a Hugging Face model directory?") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def _file_names(root: Path) -> set[str]:
    """Relative names of the files in a directory; hidden folders (`.git`, the Hub client's `.cache`) left out."""
    try:
        paths = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    except OSError as error:
        raise CheckpointError(f"cannot list {root}: {error.strerror}") from None
    return {path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parent.parts)}


def _read_config(path: Path) -> dict:
    config = read_json(path)
    layers = layer_count(config)
    if config.get("model_type") is not None and not isinstance(config["model_type"], str):
        raise CheckpointError(f"model_type {config['model_type']!r} in {path} is not a string")
    if layers is not None and (not isinstance(layers, int) or isinstance(layers, bool) or layers < 1):
        raise CheckpointError(f"{layers!r} in {path} is not a number of layers")
    return config


def _read_shards(root: Path, names: set[str], read_shard: Callable[[Path, str], Shard]) -> tuple[Shard, ...]:
    if SINGLE_FILE in names:
        return (read_shard(root, SINGLE_FILE),)
    if INDEX not in names:
        raise CheckpointError(_no_weights(root, names))
    weight_map = read_json(root / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX} has no weight_map; download it again")
    for name in weight_map.values():
        _check_shard_name(name)
    shards = tuple(read_shard(root, name) for name in dict.fromkeys(weight_map.values()))
    held = {shard.name: shard.header.tensors for shard in shards}
    for tensor, name in weight_map.items():
        if tensor not in held[name]:
            raise CheckpointError(f"{INDEX} places {tensor} in {name}, which does not hold it; download both again")
    return shards


def _check_causal(config: dict, shards: tuple[Shard, ...]) -> None:
    """An encoder of the BERT kind attends to both sides unless its config says that it is a decoder."""
    has_encoder = any(".encoder.layer." in f".{tensor}" for shard in shards for tensor in shard.header.tensors)
    if has_encoder and not config.get("is_decoder"):
        raise CheckpointError(
            f"{config['model_type']} is an encoder (is_decoder is not set); only decoders can be looped"
        )


def _check_shard_name(name) -> None:
    """Only plain file names: an index must not reach outside the directory."""
    if not isinstance(name, str) or PurePosixPath(name).name != name or "\\" in name or not name.strip("."):
        raise CheckpointError(f"{INDEX} names {name!r}, which is not a file of its own directory; do not trust it")
    if not name.endswith(".safetensors"):
        raise CheckpointError(f"{INDEX} names {name!r}, which is not safetensors; {FOREIGN_WEIGHTS['.bin']} first")


def read_local_shard(root: Path, name: str) -> Shard:
    """The weights file `name` of a directory.

    Raises:
        CheckpointError: it is missing, unreadable or damaged.
    """
    try:
        path = (root / name).resolve(strict=True)
        return Shard(name, path, path.stat().st_size, read_header(path), _sha256_of_hub_blob(path))
    except FileNotFoundError:
        raise CheckpointError(f"weights file {name} is missing in {root}; download it again") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {root / name}: {error.strerror}") from None


def _sha256_of_hub_blob(path: Path) -> str | None:
    """The sha256 of a large file in the Hub's cache, which is its name there."""
    is_blob = path.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", path.name)
    return path.name if is_blob else None


def _no_weights(root: Path, names: set[str]) -> str:
    for suffix, remedy in FOREIGN_WEIGHTS.items():
        found = sorted(name for name in names if name.endswith(suffix))
        if found:
            return f"the weights in {root} are not safetensors but {found[0]}; {remedy}, then convert the result"
    return f"no weights in {root}: neither {SINGLE_FILE} nor {INDEX}"
