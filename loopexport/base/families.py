"""Which models can be looped, decided from `config.json` alone.

The templates work on any native decoder that iterates one list of layers, so there is no list of allowed families.
`families.json` records the outcome for each family of transformers: `tests/support/family_walk.py` writes it, and
`tests/support/onnx_walk.py` writes the outcomes for ONNX.
"""

from __future__ import annotations

import inspect
import json
import re
from functools import lru_cache
from pathlib import Path

from loopexport.errors import CheckpointError
from loopexport.templates.configuration_looped import MODEL_TYPE_PREFIX
from loopexport.templates.looped_fit import ADDED_FEATURES

# Config keys for the number of decoder layers; the first one present counts.
LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

# Text families that transformers loads with the Auto classes of multimodal models alone.
LISTED_AS_MULTIMODAL = ("mistral4",)

# Config keys for the towers of a multimodal model: the parts that read images, video or sound.
TOWER_CONFIGS = ("vision_config", "audio_config", "codec_config", "vq_config")

# The ends of the names of classes that generate text: from text alone, and from text, images, video or sound.
TEXT_CLASSES = ("ForCausalLM", "LMHeadModel")
MULTIMODAL_CLASSES = (
    *TEXT_CLASSES,
    "ForConditionalGeneration",
    "ForVisionText2Text",
    "NemotronH_Omni_Reasoning_V3",
)

# Reasons recorded in the words of code, and the same in plain words; the first pattern that matches counts.
IN_WORDS = (
    (r"cannot loop a layer: \w+ takes no K/V cache.*", "one of its layers takes no K/V cache"),
    (r"cannot loop \w+: it has \d+ lists of \d+ layers, not one", "its code does not keep its layers in one list"),
    (r"Incremental decoding only supports self sequence length of 1.*", "it decodes only one token at a time"),
    (r"its tiny model has ([\d,]+) parameters", r"its smallest model has \1 parameters, too many to test"),
    (
        r"cached decoding of the base itself is off by .*",
        "the base's own cached decoding differs from its full forward",
    ),
    (r"the base itself cannot decode with a cache here: .*", "the base's own cached decoding fails on a tiny model"),
    (r"the base itself fails here: .*", "the base itself fails on a tiny model"),
    (
        r"exact with text alone; .*",
        "with text alone the loop is exact, but its tiny model was given no image or sound",
    ),
    (r"missing, unexpected or mismatched keys, .*", "the base itself does not load all of its weights"),
    (r"config.json tells (no number of layers .*)", r"config.json gives \1"),
    (r"\w+ requires the ([\w-]+) library but .*", r"it needs the library \1"),
)
NOT_MADE = "no tiny model of it could be built"  # the error of transformers itself would tell a reader nothing

FILE = Path(__file__).with_name("families.json")
# Keys beside those of the releases: the outcome of the ONNX export, and what a multimodal family reads beside text.
ONNX, READS = "onnx", "reads"
MEDIA = ("images", "sound")  # values of `READS`; some of the first read sound too


@lru_cache(maxsize=1)
def outcomes() -> dict[str, dict[str, str]]:
    """For each `model_type`, its outcome by release of transformers, such as "works" or "refused: why".

    The key `ONNX` has the outcome of the ONNX export, for text families that work at least in part on the newest
    release. The key `READS` has one of `MEDIA`, for multimodal families.
    """
    return json.loads(FILE.read_text(encoding="utf-8"))


def worded_outcomes() -> dict[str, dict[str, str]]:
    """`outcomes` with the reasons in plain words."""
    return {
        family: {key: ": ".join(filter(None, _split(outcome))) for key, outcome in record.items()}
        for family, record in outcomes().items()
    }


def newest_outcome(model_type: str) -> tuple[str, str]:
    """Status and reason of a family on the newest release it was tested on; both empty if it never was.

    `Outcome` in `tests/support/family_walk.py` defines the statuses.
    """
    record = outcomes().get(model_type, {})
    newest = max(record.keys() - {ONNX, READS}, key=_version, default="")
    return _split(record.get(newest, ""))


def onnx_outcome(model_type: str) -> tuple[str, str]:
    """Status ("works" or "refused") and reason of a family's ONNX export; both empty if it was never tested."""
    return _split(outcomes().get(model_type, {}).get(ONNX, ""))


def releases() -> list[str]:
    """The releases of transformers on which families were tested, newest first."""
    found = {release for record in outcomes().values() for release in record}
    return sorted(found - {ONNX, READS}, key=_version, reverse=True)


def grouped_outcomes(reads: str = "") -> list[tuple[tuple[str, ...], str, list[str]]]:
    """Families grouped by outcome: `(statuses, reason, families)`.

    There is one status for each of `releases()`, then one for the ONNX export. "" means that the release does not have
    the family, or that no ONNX export was tested.

    Args:
        reads: one of `MEDIA`, for the families that read it; "" for those that read text alone.
    """
    groups: dict[tuple, list[str]] = {}
    for family, record in outcomes().items():
        if record.get(READS, "") != reads:
            continue
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


def _split(outcome: str) -> tuple[str, str]:
    """Status and reason of a recorded outcome, the reason in plain words; `families.json` has those of the code."""
    status, _, reason = outcome.partition(": ")
    for pattern, words in IN_WORDS:
        match = re.fullmatch(pattern, reason)
        if match:
            return status, match.expand(words)
    return status, NOT_MADE if status == "untried" else reason


def _short(reason: str) -> str:
    """A reason without class names, tensor names and advice."""
    reason = re.split(r"[;(]|, and cannot|, for which|: choose", reason)[0].strip()
    return re.sub(r"^\w+(ForCausalLM|ForConditionalGeneration|Decoder|LMHead) is", "it is", reason)


def check_family(config: dict) -> None:
    """Check that a config describes a decoder-only language model that transformers has and that can be looped.

    It may be the language model of a multimodal model.

    Raises:
        CheckpointError: it does not; the message says what the model is and what to do.
    """
    model_type = config.get("model_type")
    if not model_type:
        raise CheckpointError("config.json has no model_type; is it in a Hugging Face model directory?")
    if model_type.startswith(MODEL_TYPE_PREFIX):
        raise CheckpointError(
            f"the model is looped already ({model_type}); change the loop_* fields of its config.json, or convert its "
            "base"
        )
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise CheckpointError(f"architectures {architectures!r} in config.json is not a list of class names")
    if isinstance(config.get("thinker_config"), dict):
        raise CheckpointError(
            f"{_names(architectures, model_type)} is several models in one (thinker_config), and only a checkpoint of "
            "its thinker alone can be looped"
        )
    for each in (config, text_config(config)):
        _check_decoder_only(each, _names(architectures, model_type))
    if not is_language_model(config) and not all(name.endswith("Model") for name in architectures):
        raise CheckpointError(
            f"{_names(architectures, model_type)} is not a causal language model (architectures: ...ForCausalLM, "
            "...LMHeadModel, or ...ForConditionalGeneration with a text_config); convert a checkpoint with the head of "
            "one"
        )
    if not layer_count(config):
        raise CheckpointError(
            f"config.json gives no number of layers ({', '.join(LAYER_COUNT_KEYS)}), so there are none to loop"
        )
    status, reason = newest_outcome(model_type)
    if status == "refused":
        raise CheckpointError(f"family {model_type!r} cannot be looped: {reason}")
    if not status:
        _check_native(model_type, ", or convert its language model with --text-only" if is_multimodal(config) else "")
        _check_generates(config)


def _check_decoder_only(config: dict, names: str) -> None:
    if config.get("is_encoder_decoder"):
        raise CheckpointError(f"{names} is an encoder-decoder; only decoders can be looped")
    if "decoder_layers" in config or "num_decoder_layers" in config:
        raise CheckpointError(f"{names} is half of an encoder-decoder; only plain decoders can be looped")


def _check_generates(config: dict) -> None:
    """Refuse multimodal families without a class that generates text, such as CLIP."""
    from transformers.models.auto import modeling_auto

    if is_multimodal(config) and not any(
        config["model_type"] in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})
        for task in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
    ):
        raise CheckpointError(
            f"transformers has no class of {config['model_type']} that generates text; only language models, alone or "
            "in a multimodal model, can be looped"
        )


def _check_native(model_type: str, or_else: str = "") -> None:
    """Check that transformers has the family's native model, which an export runs; for families without a record."""
    from transformers import CONFIG_MAPPING, __version__

    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"transformers {__version__} has no model family {model_type!r}, and an export never runs code that comes "
            f"with a checkpoint; install a transformers that has the family{or_else}"
        )


def text_config(config: dict) -> dict:
    """The config of the language model: the `text_config` of a multimodal model, else the config itself.

    Some published multimodal configs, such as Qwen2.5-VL's, have the fields of the language model on top.
    """
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def is_multimodal(config: dict) -> bool:
    """Whether a config is of a model that reads more than text."""
    if isinstance(config.get("text_config"), dict) or config.get("model_type") in LISTED_AS_MULTIMODAL:
        return True
    has_tower = any(isinstance(config.get(key), dict) for key in TOWER_CONFIGS)
    return has_tower and not _names_class(config, TEXT_CLASSES)


def is_language_model(config: dict) -> bool:
    """Whether `architectures` names a class that generates text; a bare model's name, or none, says nothing."""
    return _names_class(config, MULTIMODAL_CLASSES if is_multimodal(config) else TEXT_CLASSES)


def _names_class(config: dict, ends: tuple[str, ...]) -> bool:
    return any(name.endswith(ends) for name in config.get("architectures") or [])


def ties_by_default(model_type: str) -> bool:
    """Whether the token embeddings of a family serve as its head where the config does not say.

    Raises:
        CheckpointError: the installed transformers does not have the family.
    """
    from transformers import CONFIG_MAPPING

    _check_native(model_type)
    field = inspect.signature(CONFIG_MAPPING[model_type].__init__).parameters.get("tie_word_embeddings")
    return field is None or bool(field.default)


def layer_count(config: dict) -> int | None:
    """L, the number of decoder layers of the language model; None if the config does not say."""
    text = text_config(config)
    count = next((text[key] for key in LAYER_COUNT_KEYS if text.get(key) is not None), None)
    if count is not None:
        return count
    return len(layer_types(config) or ()) or (_default_layer_count(text) if text is not config else None)


def _default_layer_count(text: dict) -> int | None:
    """The text family's own number of layers: a `text_config` leaves out what its family has by default."""
    from transformers import CONFIG_MAPPING

    model_type = str(text.get("model_type"))
    return getattr(CONFIG_MAPPING[model_type](), "num_hidden_layers", None) if model_type in CONFIG_MAPPING else None


def vision_layers_added(config: dict) -> list | None:
    """The layers of the vision tower whose features the model adds to outputs of its first decoder layers."""
    vision = config.get("vision_config")
    return vision.get(ADDED_FEATURES) if isinstance(vision, dict) else None


def layer_types(config: dict) -> list | None:
    """The type of each layer of the language model, such as `full_attention`; None if the config does not say."""
    text = text_config(config)
    types = text.get("layer_types") or text.get("layers_block_type")
    return types if isinstance(types, list) else None


def _names(architectures: list[str], model_type: str) -> str:
    return ", ".join(architectures) or model_type
