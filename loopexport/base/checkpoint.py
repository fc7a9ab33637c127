"""Read a base checkpoint: its file names, its config, and the headers of its weights, never the weights themselves."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from loopexport.errors import CheckpointError
from loopexport.files.links import check_link
from loopexport.templates.configuration_looped import MODEL_TYPE_PREFIX

from .families import check_family, is_multimodal, layer_count, text_config
from .language_model import language_model_config
from .loadable import check_index, check_loadable
from .processor import FILES as PROCESSOR_FILES
from .safetensors_header import Header, Tensor, read_header
from .tensor_names import is_tower, layer_of
from .tokenizer import FILES as TOKENIZER_FILES

CONFIG = "config.json"
CARD = "README.md"
MANIFEST = "loopexport.json"  # only exports have it, and an export is not a base
INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

LICENCE_TEXT = re.compile(r"(?i:(licen[cs]e|notice|copying|use_policy|usage_policy)([._-][\w.-]*)?)")

# Names of the small files that an export copies from the base. It copies nothing else: no foreign code, no pickles,
# no secrets.
CARRIED = re.compile(
    rf"""
      generation_config\.json
    | {TOKENIZER_FILES.pattern} | {PROCESSOR_FILES.pattern}
    | (quantize_config|quant_config|hf_quant_config)\.json | recipe\.yaml
    | chat_template\.(jinja|json) | additional_chat_templates/[\w.-]+\.jinja
    | {LICENCE_TEXT.pattern}
    """,
    re.VERBOSE,
)

# Folders that may hold such files.
CARRYING_FOLDERS = ("", "additional_chat_templates/")

# Other weights formats by suffix, and how to turn each into safetensors.
FOREIGN_WEIGHTS = {
    ".gguf": "load it with transformers (`from_pretrained(dir, gguf_file=...)`) and `save_pretrained` it",
    ".bin": "load it with transformers and `save_pretrained` it",
    ".pt": "load it with transformers and `save_pretrained` it",
    ".pth": "load it with transformers and `save_pretrained` it",
    ".h5": "load it with transformers and `save_pretrained` it",
}

# Parameters of layers that remember more than a K/V cache: state spaces, linear attention, convolutions, compressors.
RECURRENT_TENSOR = re.compile(r"\.(A_log|conv_?1d|conv\.conv|rg_lru|time_decay|linear_attn|compressor)\b")

# Those of them whose memory no loop can handle: a state in the module itself.
UNLOOPABLE_TENSOR = re.compile(r"\.(rg_lru|time_decay)\b")

# Config keys for the number of experts in a sparse layer.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

MAX_LAYERS = 100_000  # far more than any model has, and a loop over them still takes no time


@dataclass(frozen=True)
class Shard:
    """One weights file.

    Attributes:
        name: its name in the checkpoint.
        path: the real file, with all links resolved; a plan that read only headers from the Hub has no file there yet.
        size: in bytes.
        header: its tensors.
        sha256: of the whole file if no hashing is needed to know it (the Hub cache names its blobs by it), else None.
    """

    name: str
    path: Path
    size: int
    header: Header
    sha256: str | None = None


@dataclass(frozen=True)
class Origin:
    """Where a base came from, in terms that may be published: never an absolute path.

    Attributes:
        name: a Hub id, or the name of a local directory.
        revision: the Hub commit, 40 hex digits; None for a local directory.
    """

    name: str
    revision: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A decoder-only language model, alone or in a multimodal model, on disk, that has passed all checks.

    Attributes:
        root: its directory.
        origin: where it came from.
        config: the parsed `config.json`.
        shards: its weights files, in the index's order.
        carried: names of the small files that an export copies, sorted.
        left_behind: names of the files that an export does not copy, sorted.
        edited: contents of the small files that differ from those in `root`, by name; empty but for a language model
            that is taken out of a multimodal checkpoint.
    """

    root: Path
    origin: Origin
    config: dict
    shards: tuple[Shard, ...]
    carried: tuple[str, ...]
    left_behind: tuple[str, ...] = field(default=())
    edited: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        """The base's `model_type`, such as `qwen3`."""
        return self.config["model_type"]

    @property
    def text_config(self) -> dict:
        """The config of the language model, which is the config itself unless the model is multimodal."""
        return text_config(self.config)

    @property
    def is_multimodal(self) -> bool:
        """Whether the model reads more than text."""
        return is_multimodal(self.config)

    @property
    def num_layers(self) -> int:
        """L, the number of decoder layers, of the language model alone."""
        count = layer_count(self.config)
        assert count is not None, "check_family refuses such a config"
        return count

    @property
    def index_name(self) -> str | None:
        """Name of the weights index, or None for a single-file checkpoint."""
        return INDEX if INDEX in self.carried else None

    @property
    def weight_bytes(self) -> int:
        """Total size of all weights files."""
        return sum(shard.size for shard in self.shards)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {name: tensor for shard in self.shards for name, tensor in shard.header.tensors.items()}

    @property
    def num_params(self) -> int:
        """Number of tensor elements, without towers; quantised weights pack several parameters into one element."""
        return sum(tensor.num_elements for name, tensor in self.tensors.items() if not is_tower(name))

    @property
    def is_sparse(self) -> bool:
        """Whether the model has sparse layers, which send each token to a few of many experts."""
        return any(".experts." in name for name in self.tensors) or any(
            isinstance(self.text_config.get(key), int) and self.text_config[key] > 1 for key in EXPERTS
        )

    @property
    def quantisation(self) -> str | None:
        """The quantisation method by its name in transformers, such as `gptq` or `fp8`; None for plain weights."""
        values = self.config.get("quantization_config") or self.text_config.get("quantization_config")
        if not values:
            return None
        method = values.get("quant_method") if isinstance(values, dict) else None
        return str(method or "bitsandbytes")  # its early configs did not name the method

    @cached_property
    def recurrent_tensors(self) -> dict[int, str]:
        """For each layer that remembers more than keys and values, the name of a tensor that shows it."""
        return self._layers_with(RECURRENT_TENSOR)

    @cached_property
    def unloopable_tensors(self) -> dict[int, str]:
        """For each layer whose memory no loop can handle, the name of a tensor that shows it."""
        return self._layers_with(UNLOOPABLE_TENSOR)

    def _layers_with(self, pattern: re.Pattern) -> dict[int, str]:
        owners = {name: layer_of(name) for name in self.tensors if pattern.search(name)}
        return {layer: name for name, layer in owners.items() if layer is not None}


def open_checkpoint(
    root: Path,
    origin: Origin | None = None,
    names: set[str] | None = None,
    read_shard: Callable[[Path, str], Shard] | None = None,
    config: dict | None = None,
    text_only: bool = False,
) -> Checkpoint:
    """Read and check the checkpoint in a directory; it writes nothing.

    Args:
        root: the directory; it holds at least `config.json` and, for several shards, their index.
        origin: where the checkpoint came from; None means a local directory, named after `root`.
        names: all files of the checkpoint, if `root` does not hold them all yet; None lists `root`.
        read_shard: called with `root` and a file name, returns the shard; None reads it from `root`.
        config: its config; None reads `config.json` in `root`.
        text_only: check only that the language model in it can be looped; `text_checkpoint` takes it out.

    Raises:
        CheckpointError: a file cannot be read, or the model cannot be looped; the message names the file or the reason.
    """
    names = file_names(root) if names is None else names
    _check_links(root, names)
    config = read_config(root / CONFIG) if config is None else config
    _check_is_base(root, config)
    check_family(language_model_config(config) if text_only else config)
    shards = _read_shards(root, names, read_shard or read_local_shard)
    if not text_only:
        _check_causal(config, shards)
        check_loadable(config, [tensor for shard in shards for tensor in shard.header.tensors])
    weights = {shard.name for shard in shards}
    carried = {name for name in names if CARRIED.fullmatch(name)}
    if SINGLE_FILE not in weights:
        carried.add(INDEX)
    return Checkpoint(
        root=root,
        origin=origin or Origin(directory_name(root)),
        config=config,
        shards=shards,
        carried=tuple(sorted(carried)),
        left_behind=tuple(sorted(names - carried - weights - {CONFIG, CARD})),
    )


def _check_links(root: Path, names: set[str]) -> None:
    """Refuse links out of the directory, except for weights.

    Users do link weights to another disk. A link to anything else leaks nothing: `read_header` takes only weights.
    """
    for name in sorted(names):
        if CARRIED.fullmatch(name) or name in (CONFIG, CARD, INDEX):
            check_link(root, name)


def read_json(path: Path) -> dict:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: the file is missing or unreadable, or holds something else.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block
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


def directory_name(root: Path) -> str:
    """The name of a directory as printable text, with U+FFFD for anything else."""
    name = os.fsencode(os.path.basename(os.path.realpath(root))).decode("utf-8", errors="replace")
    return "".join(char if char.isprintable() else "\ufffd" for char in name)


def file_names(root: Path) -> set[str]:
    """List the files in a directory by relative name, skipping hidden folders (`.git`, the Hub client's `.cache`).

    Raises:
        CheckpointError: the directory, or a folder in it that may hold files to copy, cannot be listed.
    """
    names, folders = set(), [""]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(root / folder))
        except OSError as error:
            if folder in CARRYING_FOLDERS:
                raise CheckpointError(f"cannot list {root / folder}: {error.strerror}") from None
            continue  # such as lost+found; an export copies nothing from there
        names |= {folder + entry.name for entry in entries if os.path.isfile(entry.path)}
        inner = (entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        folders += [f"{folder}{name}/" for name in inner if not name.startswith(".")]
    return names


def read_config(path: Path) -> dict:
    """Read a config and check the types of its `model_type` and its number of layers, if it has them.

    Raises:
        CheckpointError: the file cannot be read, or one of the two has a wrong type or value.
    """
    config = read_json(path)
    layers = layer_count(config)
    if config.get("model_type") is not None and not isinstance(config["model_type"], str):
        raise CheckpointError(f"model_type {config['model_type']!r} in {path} is not a string")
    if layers is not None and (type(layers) is not int or not 1 <= layers <= MAX_LAYERS):
        raise CheckpointError(f"{layers!r} in {path} is not a number of layers from 1 to {MAX_LAYERS:,}")
    return config


def _read_shards(root: Path, names: set[str], read_shard: Callable[[Path, str], Shard]) -> tuple[Shard, ...]:
    if SINGLE_FILE in names:
        shard = read_shard(root, SINGLE_FILE)
        if not shard.header.tensors:
            raise CheckpointError(f"{SINGLE_FILE} in {root} holds no tensors; download it again")
        return (shard,)
    if INDEX not in names:
        raise CheckpointError(_no_weights(root, names))
    index = read_json(root / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX} has no weight_map; download it again")
    for name in weight_map.values():
        _check_shard_name(name)
    check_index(index, INDEX)
    shards = tuple(read_shard(root, name) for name in dict.fromkeys(weight_map.values()))
    held = {shard.name: shard.header.tensors for shard in shards}
    for tensor, name in weight_map.items():
        if tensor not in held[name]:
            raise CheckpointError(f"{INDEX} says that {name} holds {tensor}, but it does not; download both again")
    return shards


def _check_is_base(root: Path, config: dict) -> None:
    """Refuse an export and name `restore`, which needs its manifest; without one, `check_family` gives other advice."""
    if str(config.get("model_type")).startswith(MODEL_TYPE_PREFIX) and (root / MANIFEST).is_file():
        raise CheckpointError(
            f"the model is looped already ({config['model_type']}); change the loop_* fields of its config.json, or "
            f"run `loopexport restore {root} OUT` and convert OUT"
        )


def _check_causal(config: dict, shards: tuple[Shard, ...]) -> None:
    """Refuse BERT-like encoders: they attend to later tokens too, unless the config sets `is_decoder`."""
    names = (name for shard in shards for name in shard.header.tensors if not is_tower(name))
    has_encoder = any(".encoder.layer." in f".{name}" for name in names)
    if has_encoder and not text_config(config).get("is_decoder"):
        raise CheckpointError(
            f"{config['model_type']} is an encoder (is_decoder is not set); only decoders can be looped"
        )


def _check_shard_name(name) -> None:
    """Allow plain file names only, so that an index cannot reach outside its directory."""
    is_plain = isinstance(name, str) and name.isprintable() and "\\" not in name and name.strip(".")
    if not is_plain or PurePosixPath(name).name != name:
        raise CheckpointError(f"{INDEX} names {name!r}, which is not a plain file name; do not trust this checkpoint")
    if not name.endswith(".safetensors"):
        raise CheckpointError(f"{INDEX} names {name!r}, which is not safetensors; {FOREIGN_WEIGHTS['.bin']} first")


def read_local_shard(root: Path, name: str) -> Shard:
    """Read the header of the weights file `name` in a directory.

    Raises:
        CheckpointError: the file is missing, unreadable or damaged.
    """
    try:
        path = Path(os.path.realpath(root / name, strict=True))
        if not path.is_file():  # reading a pipe would block
            raise CheckpointError(f"weights file {name} in {root} is not a regular file")
        return Shard(name, path, path.stat().st_size, read_header(path), _sha256_of_hub_blob(path))
    except FileNotFoundError:
        raise CheckpointError(f"weights file {name} is missing in {root}; download it again") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {root / name}: {error.strerror}") from None


def _sha256_of_hub_blob(path: Path) -> str | None:
    """The sha256 of a large file in the Hub's cache, read off its name; None for other files."""
    is_blob = path.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", path.name)
    return path.name if is_blob else None


def _no_weights(root: Path, names: set[str]) -> str:
    for suffix, remedy in FOREIGN_WEIGHTS.items():
        found = sorted(name for name in names if name.endswith(suffix))
        if found:
            return f"the weights in {root} are not safetensors ({found[0]}); {remedy}, then convert the result"
    return f"no weights in {root}: it has neither {SINGLE_FILE} nor {INDEX}; download them"
