"""Which models can be looped, told from `config.json` alone.

The modeling template works on any native decoder that iterates one list of layers, so there is no list of allowed
families. `families.json` records what came of each family of transformers. It is written by `tests/family_walk.py`,
and by `tests/onnx_walk.py` as to ONNX.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

from loopexport.errors import CheckpointError
from loopexport.templates.configuration_looped import MODEL_TYPE_PREFIX

# What the number of decoder layers is called; the first that a config has counts.
LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

# What the record has in the words of code, and what it means; the first that matches a reason counts.
IN_WORDS = (
    (r"cannot loop a layer: \w+ takes no K/V cache.*", "a layer of it takes no K/V cache"),
    (r"cannot loop \w+: it has \d+ lists of \d+ layers, not one", "its code does not hold its layers in one list"),
    (r"Incremental decoding only supports self sequence length of 1.*", "it decodes one token at a time only"),
    (r"its tiny model has ([\d,]+) parameters", r"its smallest model has \1 parameters, too many to try"),
    (r"cached decoding of the base itself is off by .*", "the base's own cached decoding is not its full forward"),
    (r"the base itself cannot decode with a cache here: .*", "the base's own cached decoding fails on a tiny model"),
    (r"\w+ requires the ([\w-]+) library but .*", r"it needs the library \1"),
)
NOT_MADE = "no tiny model of it could be made"  # whatever transformers said: that is of no use to a reader

FILE = Path(__file__).with_name("families.json")
ONNX = "onnx"  # the key beside the releases: what came of an ONNX export on the newest


@lru_cache(maxsize=1)
def outcomes() -> dict[str, dict[str, str]]:
    """For each `model_type`, what came of it by release of transformers: "works", or "refused: why", and the like.

    Under `ONNX` it says what came of the ONNX export of a family that works at least in part on the newest release.
    """
    return json.loads(FILE.read_text(encoding="utf-8"))


def newest_outcome(model_type: str) -> tuple[str, str]:
    """Status and reason of a family on the newest release that was tried; both empty for one that never was.

    The statuses are those of `Outcome` in `tests/family_walk.py`.
    """
    record = outcomes().get(model_type, {})
    newest = max(record.keys() - {ONNX}, key=_version, default="")
    status, _, reason = record.get(newest, "").partition(": ")
    return status, _in_words(status, reason)


def onnx_outcome(model_type: str) -> tuple[str, str]:
    """Status ("works" or "refused") and reason of a family's ONNX export; both empty for one that was not tried."""
    status, _, reason = outcomes().get(model_type, {}).get(ONNX, "").partition(": ")
    return status, reason


def releases() -> list[str]:
    """The releases of transformers on which families were tried, newest first."""
    found = {release for record in outcomes().values() for release in record}
    return sorted(found - {ONNX}, key=_version, reverse=True)


def grouped_outcomes() -> list[tuple[tuple[str, ...], str, list[str]]]:
    """Families of like outcome: their statuses, why, and their names.

    The statuses are those by `releases()`, then that of the ONNX export; "" where one has no such family, or none that
    could be exported.
    """
    groups: dict[tuple, list[str]] = {}
    for family, record in outcomes().items():
        statuses = tuple(record.get(key, "").partition(": ")[0] for key in (*releases(), ONNX))
        reasons = [_short(newest_outcome(family)[1]), _short(onnx_outcome(family)[1])]
        reason = "; ONNX: ".join(reasons) if all(reasons) else "".join(reasons)
        groups.setdefault((statuses, reason), []).append(family)
    order = ["works", "in part", "no span", "refused", "untried", ""]
    return sorted(
        ((statuses, reason, families) for (statuses, reason), families in groups.items()),
        key=lambda group: ([order.index(status) for status in group[0]], -len(group[2])),
    )


def _version(release: str) -> list[int]:
    return [int(part) for part in release.split(".")]


def _in_words(status: str, reason: str) -> str:
    """A recorded reason as a plain sentence; `families.json` keeps what the code said."""
    for pattern, words in IN_WORDS:
        match = re.fullmatch(pattern, reason)
        if match:
            return match.expand(words)
    return NOT_MADE if status == "untried" else reason


def _short(reason: str) -> str:
    """A reason without the names of classes and tensors, and without advice."""
    reason = re.split(r"[;(]|, and cannot|, for which|: choose", reason)[0].strip()
    return re.sub(r"^\w+(ForCausalLM|ForConditionalGeneration|Decoder|LMHead) is", "it is", reason)


def check_family(config: dict) -> None:
    """Check that a config describes a decoder-only causal language model that transformers has and can be looped.

    Raises:
        CheckpointError: it does not; the message says what it is and what can be done.
    """
    model_type = config.get("model_type")
    if not model_type:
        raise CheckpointError("config.json names no model_type; is it a Hugging Face model directory?")
    if model_type.startswith(MODEL_TYPE_PREFIX):
        raise CheckpointError(
            f"the model is looped already ({model_type}); change the loop_* fields of its config.json, or convert the "
            "base that it was made from"
        )
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise CheckpointError(f"architectures {architectures!r} in config.json is not a list of class names")
    if config.get("is_encoder_decoder"):
        raise CheckpointError(f"{_names(architectures, model_type)} is an encoder-decoder; only decoders can be looped")
    if "decoder_layers" in config or "num_decoder_layers" in config:
        raise CheckpointError(
            f"{_names(architectures, model_type)} is half of an encoder-decoder; only plain decoders can be looped"
        )
    if isinstance(config.get("text_config"), dict):
        raise CheckpointError(
            f"{_names(architectures, model_type)} is multimodal; take its language model out "
            "(examples/language_model.py does) and convert that"
        )
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise CheckpointError(
            f"{_names(architectures, model_type)} is not a causal language model "
            "(architectures: ...ForCausalLM or ...LMHeadModel)"
        )
    if not layer_count(config):
        raise CheckpointError(
            f"config.json tells no number of layers ({', '.join(LAYER_COUNT_KEYS)}), so there are none to loop"
        )
    status, reason = newest_outcome(model_type)
    if status == "refused":
        raise CheckpointError(f"family {model_type!r} cannot be looped: {reason}")
    if not status:
        _check_native(model_type)


def _check_native(model_type: str) -> None:
    """An export runs the native model of its family, so transformers has to have one; asked where no record tells."""
    from transformers import CONFIG_MAPPING, __version__

    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"transformers {__version__} has no model family {model_type!r}; an export runs the native code of its "
            "family, never code that comes with a checkpoint: install a transformers that has it"
        )


def layer_count(config: dict) -> int | None:
    """L, the number of decoder layers, or None where the config does not tell."""
    count = next((config[key] for key in LAYER_COUNT_KEYS if config.get(key) is not None), None)
    types = layer_types(config)
    return len(types) if count is None and types else count


def layer_types(config: dict) -> list | None:
    """The type of each layer by name, or None where the config does not tell."""
    types = config.get("layer_types") or config.get("layers_block_type")
    return types if isinstance(types, list) else None


def _names(architectures: list[str], model_type: str) -> str:
    return ", ".join(architectures) or model_type
