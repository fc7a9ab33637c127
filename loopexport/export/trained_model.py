"""Read and check a directory that `save_pretrained` of a looped model wrote."""

from __future__ import annotations

import os
import re
from dataclasses import MISSING, fields
from pathlib import Path

from loopexport.base.checkpoint import CARD, CONFIG, FOREIGN_WEIGHTS, MANIFEST, Checkpoint, file_names
from loopexport.base.families import is_language_model, is_multimodal, layer_types
from loopexport.errors import ExportError
from loopexport.loop.spec import LoopSpec
from loopexport.templates import FILES as TEMPLATES
from loopexport.templates.configuration_looped import MODEL_TYPE_PREFIX, base_model_type
from loopexport.templates.looped_fit import check_depth, check_layer_types
from loopexport.templates.looped_spec import FIELD_PREFIX

from .card import MADE_WITH, with_licence
from .directory import BASE_FOLDER, MODEL_FILE_FIELD, MULTIMODAL_AUTO, TEXT_AUTO
from .own_code import CODE_NAMES, CUSTOM_GENERATE, code_set, template_bytes
from .small_files import read_file

ADAPTER_CONFIG = "adapter_config.json"

# What trainers write beside the weights.
TRAINING_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state\w*)\.(bin|pt|pth)")

# Tensors of adapters that were not merged.
MERGE = "merge it (`model.merge_and_unload()` of peft), save the result with `save_pretrained`, and adopt that"

# An absolute path in text, but not the path of a URL.
PATH_IN_TEXT = re.compile(r"(?<![\w.:/])/(?:[\w.-]+/)+[\w.-]+")


def check_directory(root: Path) -> None:
    """Check that a directory may hold a trained looped model and is not an export yet.

    Raises:
        ExportError: it does not; the message says what to do.
    """
    if not os.path.isdir(root):
        raise ExportError(f"no directory {root}, or it is unreadable; give one that `save_pretrained` wrote")
    for name in (MANIFEST, BASE_FOLDER):
        if os.path.lexists(root / name):
            raise ExportError(
                f"{root} has {name} and so seems to be an export already; if its weights were trained since, move "
                f"{MANIFEST} and {BASE_FOLDER}/ elsewhere and run `adopt` again"
            )
    if os.path.lexists(root / ADAPTER_CONFIG):
        raise ExportError(f"{root} holds an adapter ({ADAPTER_CONFIG}), not a whole model; {MERGE}")
    for name in sorted(file_names(root)):
        suffix = Path(name).suffix
        if "/" not in name and suffix in FOREIGN_WEIGHTS and not TRAINING_STATE.fullmatch(name):
            raise ExportError(
                f"{name} in {root} may hold weights that are not safetensors; {FOREIGN_WEIGHTS[suffix]}, or move the "
                "file elsewhere, then adopt the result"
            )


def training_files(root: Path) -> list[str]:
    """Names of the files of a trainer in any folder of the directory that `push` takes for pickles."""
    return sorted(name for name in file_names(root) if Path(name).suffix in FOREIGN_WEIGHTS)


def read_loop(root: Path, config: dict) -> LoopSpec:
    """The loop in a config. A field with a default may be missing, because some tools do not save null.

    Raises:
        ExportError: the model is not looped, or its loop is impossible.
    """
    path = root / CONFIG
    if not str(config.get("model_type")).startswith(MODEL_TYPE_PREFIX):
        raise ExportError(
            f"{path} has model_type {config.get('model_type')!r}, which is not a looped model; "
            "`loopexport convert` makes one of it"
        )
    given = {name.removeprefix(FIELD_PREFIX): config[name] for name in config if name.startswith(FIELD_PREFIX)}
    known = {each.name: each.default for each in fields(LoopSpec)}
    missing = [name for name in known if name not in given and known[name] is MISSING]
    unknown = [name for name in given if name not in known]
    if missing:
        raise ExportError(f"{path} has no {FIELD_PREFIX}{missing[0]}; copy the loop_* fields of the export's config")
    if unknown:
        raise ExportError(f"{path} has {FIELD_PREFIX}{unknown[0]}, which is not a field of the loop; remove it")
    try:
        return LoopSpec(**given)
    except ValueError as error:
        raise ExportError(f"{path} holds an impossible loop: {error}") from None


def native_config(root: Path, config: dict) -> dict:
    """The config of the native model: the looped one without what `looped_config` adds.

    `_name_or_path` is left out: it says where the model was loaded from, and may be an absolute path.

    Raises:
        ExportError: the model was saved without its head, or the installed transformers does not have its family.
    """
    classes = config.get("architectures")
    auto = MULTIMODAL_AUTO if is_multimodal(config) else TEXT_AUTO
    if isinstance(classes, list) and classes and not is_language_model({**config, "architectures": map(str, classes)}):
        raise ExportError(
            f"{root / CONFIG} has architectures {classes!r}: the model was saved without its head; load the export "
            f"with {auto}, train that, and save it"
        )
    model_type = base_model_type(config["model_type"])
    added = ("auto_map", "_name_or_path", MODEL_FILE_FIELD)
    own = {name: value for name, value in config.items() if not name.startswith(FIELD_PREFIX) and name not in added}
    return {**own, "model_type": model_type, "architectures": [_native_class(model_type, is_multimodal(config))]}


def _native_class(model_type: str, multimodal: bool) -> str:
    from transformers import __version__
    from transformers.models.auto import modeling_auto

    tasks = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "CAUSAL_LM") if multimodal else ("CAUSAL_LM",)
    for task in tasks:
        names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})
        if model_type in names:
            return names[model_type]
    raise ExportError(
        f"transformers {__version__} has no class of family {model_type!r} that generates text; install a newer one"
    )


def check_model(model: Checkpoint, spec: LoopSpec) -> None:
    """Raise ExportError unless the loop fits the model."""
    try:
        check_depth(spec, model.num_layers)
        check_layer_types(spec, layer_types(model.config))
    except ValueError as error:
        raise ExportError(f"{model.root / CONFIG} holds an impossible loop: {error}") from None


def own_code(root: Path) -> dict[str, bytes]:
    """The contents of the code files: those of the directory, or today's where it has none.

    Raises:
        ExportError: the directory holds other code.
    """
    known = code_set(root)
    if known is not None and not os.path.lexists(root / CUSTOM_GENERATE):
        return {name: read_file(root / name) for name in known}
    found = [name for name in (*CODE_NAMES, CUSTOM_GENERATE) if os.path.lexists(root / name)]
    if found:
        raise ExportError(
            f"the code in {root} is not LoopExport's ({', '.join(found)}); read it, remove these files, and adopt the "
            "directory again with today's code"
        )
    return {name: template_bytes(name) for name in TEMPLATES}


def trained_card(root: Path) -> str:
    """The text of the directory's README.md, which becomes the original of the card; empty if there is none.

    Raises:
        ExportError: it contains a path of this machine, and a card may be published.
    """
    path = root / CARD
    text = read_file(path).decode("utf-8", errors="replace") if path.is_file() else ""
    local = next(filter(os.path.exists, PATH_IN_TEXT.findall(text)), None)
    if local is not None:
        raise ExportError(f"{path} contains the absolute path {local}, and cards are published; remove it there")
    # LoopExport's own card, copied from the export, says that the weights are the base's.
    return with_licence("", text) if MADE_WITH in text else text
