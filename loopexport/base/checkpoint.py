"""Read a base checkpoint: which files it has, what its config says, and what its weights are, without loading them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from loopexport.errors import CheckpointError
from loopexport.templates.configuration_looped import MODEL_TYPE_PREFIX

from .families import check_family, layer_count
from .safetensors_header import Header, Tensor, read_header
from .tokenizer import FILES as TOKENIZER_FILES

CONFIG = "config.json"
CARD = "README.md"
MANIFEST = "loopexport.json"  # of an export, which is no base
INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

LICENCE_TEXT = re.compile(r"(?i:(licen[cs]e|notice|copying|use_policy|usage_policy)([._-][\w.-]*)?)")

# The small files that an export carries, by name. Everything else stays behind: foreign code, pickles, secrets.
CARRIED = re.compile(
    rf"""
      generation_config\.json
    | {TOKENIZER_FILES.pattern}
    | (quantize_config|quant_config|hf_quant_config)\.json | recipe\.yaml
    | chat_template\.(jinja|json) | additional_chat_templates/[\w.-]+\.jinja
    | {LICENCE_TEXT.pattern}
    """,
    re.VERBOSE,
)

CARRYING_FOLDERS = ("", "additional_chat_templates/")

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

# What the number of experts to choose from is called.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


LAYER_TENSOR = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d{1,6})\.")

MAX_LAYERS = 100_000  # far beyond any model, and few enough to be counted one by one


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

    @property
    def num_params(self) -> int:
        """Number of elements of all tensors; quantised ones are packed, so that it says little of them."""
        return sum(tensor.num_elements for tensor in self.tensors.values())

    @property
    def is_sparse(self) -> bool:
        """Whether it has layers that send a token to some of many experts."""
        return any(".experts." in name for name in self.tensors) or any(
            isinstance(self.config.get(key), int) and self.config[key] > 1 for key in EXPERTS
        )

    @property
    def quantisation(self) -> str | None:
        """What the weights are quantised by, as transformers calls it (`gptq`, `fp8`); None where they are not."""
        values = self.config.get("quantization_config")
        if not values:
            return None
        method = values.get("quant_method") if isinstance(values, dict) else None
        return str(method or "bitsandbytes")  # whose first configs did not name it

    @cached_property
    def recurrent_tensors(self) -> dict[int, str]:
        """By layer number, a tensor that shows the layer to keep more of the past than keys and values."""
        found = {}
        for name in self.tensors:
            layer = layer_of(name)
            if layer is not None and RECURRENT_TENSOR.search(name):
                found[layer] = name
        return found


def layer_of(name: str) -> int | None:
    """The number of the decoder layer that a tensor belongs to; None for one outside the layers."""
    match = LAYER_TENSOR.search(name)
    return int(match[1]) if match else None


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
    names = file_names(root) if names is None else names
    config = read_config(config_path or root / CONFIG)
    _check_is_base(root, config)
    check_family(config)
    shards = _read_shards(root, names, read_shard or read_local_shard)
    _check_causal(config, shards)
    weights = {shard.name for shard in shards}
    carried = {name for name in names if CARRIED.fullmatch(name)}
    if SINGLE_FILE not in weights:
        carried.add(INDEX)
    return Checkpoint(
        root=root,
        origin=origin or Origin(_directory_name(root)),
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
        if path.exists() and not path.is_file():  # a pipe would keep us waiting
            raise CheckpointError(f"{path} is not a file")
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


def _directory_name(root: Path) -> str:
    """The name of a directory as text: what is no text in it, or cannot be printed, is replaced."""
    name = os.fsencode(os.path.basename(os.path.realpath(root))).decode("utf-8", errors="replace")
    return "".join(char if char.isprintable() else "\ufffd" for char in name)


def file_names(root: Path) -> set[str]:
    """Relative names of the files in a directory; hidden folders (`.git`, the Hub client's `.cache`) left out.

    Raises:
        CheckpointError: the directory, or a folder in it that may hold what an export carries, cannot be listed.
    """
    names, folders = set(), [""]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(root / folder))
        except OSError as error:
            if folder in CARRYING_FOLDERS:
                raise CheckpointError(f"cannot list {root / folder}: {error.strerror}") from None
            continue  # another's folder, such as lost+found: it would stay behind anyway
        names |= {folder + entry.name for entry in entries if os.path.isfile(entry.path)}
        inner = (entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        folders += [f"{folder}{name}/" for name in inner if not name.startswith(".")]
    return names


def read_config(path: Path) -> dict:
    """The config in a file, with its number of layers and its `model_type`, if it has them, of the right types.

    Raises:
        CheckpointError: it cannot be read, or holds them in other types.
    """
    config = read_json(path)
    layers = layer_count(config)
    if config.get("model_type") is not None and not isinstance(config["model_type"], str):
        raise CheckpointError(f"model_type {config['model_type']!r} in {path} is not a string")
    if layers is not None and (type(layers) is not int or not 1 <= layers <= MAX_LAYERS):
        raise CheckpointError(f"{layers!r} in {path} is not a number of layers, 1 to {MAX_LAYERS:,}")
    return config


def _read_shards(root: Path, names: set[str], read_shard: Callable[[Path, str], Shard]) -> tuple[Shard, ...]:
    if SINGLE_FILE in names:
        shard = read_shard(root, SINGLE_FILE)
        if not shard.header.tensors:
            raise CheckpointError(f"{SINGLE_FILE} in {root} holds no tensors; download it again")
        return (shard,)
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


def _check_is_base(root: Path, config: dict) -> None:
    """An export with its manifest gives its base back; to one without, the advice of `check_family` applies."""
    if str(config.get("model_type")).startswith(MODEL_TYPE_PREFIX) and (root / MANIFEST).is_file():
        raise CheckpointError(
            f"the model is looped already ({config['model_type']}); change the loop_* fields of its config.json, or "
            f"`loopexport restore {root} OUT` and convert that"
        )


def _check_causal(config: dict, shards: tuple[Shard, ...]) -> None:
    """An encoder of the BERT kind attends to both sides unless its config says that it is a decoder."""
    has_encoder = any(".encoder.layer." in f".{tensor}" for shard in shards for tensor in shard.header.tensors)
    if has_encoder and not config.get("is_decoder"):
        raise CheckpointError(
            f"{config['model_type']} is an encoder (is_decoder is not set); only decoders can be looped"
        )


def _check_shard_name(name) -> None:
    """Only plain file names: an index must not reach outside the directory."""
    is_plain = isinstance(name, str) and name.isprintable() and "\\" not in name and name.strip(".")
    if not is_plain or PurePosixPath(name).name != name:
        raise CheckpointError(f"{INDEX} names {name!r}, which is not a file of its own directory; do not trust it")
    if not name.endswith(".safetensors"):
        raise CheckpointError(f"{INDEX} names {name!r}, which is not safetensors; {FOREIGN_WEIGHTS['.bin']} first")


def read_local_shard(root: Path, name: str) -> Shard:
    """The weights file `name` of a directory.

    Raises:
        CheckpointError: it is missing, unreadable or damaged.
    """
    try:
        path = Path(os.path.realpath(root / name, strict=True))
        if not path.is_file():  # a pipe would keep us waiting
            raise CheckpointError(f"weights file {name} in {root} is not a regular file")
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
