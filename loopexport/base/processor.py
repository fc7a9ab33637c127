"""The base's processor in an export: the files that say how a multimodal model reads images, video and sound.

An export copies them, but never code that came with the base: the export's copies do not ask for it, and the originals
move to `base/`. transformers then uses its own class of the same name or family, or refuses to load the processor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping

from loopexport.errors import CheckpointError
from loopexport.files.json_text import read_object, values_of, without_key

from .tokenizer import CONFIG as TOKENIZER_CONFIG

PREPROCESSOR = "preprocessor_config.json"  # of images or sound
PROCESSOR = "processor_config.json"  # of all together; transformers 5 writes nothing else

# What `save_pretrained` of processors, image and video processors and feature extractors writes in transformers 4.57
# and 5.24, without chat templates.
NAMES = (PREPROCESSOR, PROCESSOR, "video_preprocessor_config.json", "audio_tokenizer_config.json")
FILES = re.compile("|".join(map(re.escape, NAMES)))


def foreign_classes(files: Mapping[str, bytes]) -> list[str]:
    """The classes, as `module.Class`, for which processor files ask code of the base; `files` are contents by name."""
    return sorted({name for content in files.values() for name in _foreign(read_object(content))})


def without_foreign_code(files: dict[str, bytes]) -> dict[str, bytes]:
    """Edit `files`, contents by name, so that the processor needs no code of the base; return the files it replaced.

    Raises:
        CheckpointError: a processor file is not a JSON object.
    """
    originals = {}
    for name, content in processor_files(files).items():
        try:
            config = _read(name, content)
            if list(values_of("auto_map", config)):
                originals[name] = content
                files[name] = (json.dumps(without_key("auto_map", config), indent=2) + "\n").encode()
        except RecursionError:
            raise CheckpointError(f"{name} is nested too deeply; download or save the processor again") from None
    return originals


def processor_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Those of `files`, contents by name, in which AutoProcessor looks for a class."""
    return {name: content for name, content in files.items() if name in (*NAMES, TOKENIZER_CONFIG)}


def has_processor(names: Collection[str]) -> bool:
    """Whether AutoProcessor finds the files that it needs."""
    return PREPROCESSOR in names or PROCESSOR in names


def processor_warnings(files: Mapping[str, bytes], base_name: str) -> list[str]:
    """What the user should know about the processor of a multimodal base, one line each.

    Args:
        files: contents of the base's processor files, by name.
        base_name: the name of the base.
    """
    if not has_processor(files):
        return [
            f"{base_name} has no {PREPROCESSOR}; AutoProcessor will not load, so only text can be prepared: add the "
            "base's processor files to its directory and convert again"
        ]
    return [foreign_code_warning(files)] if foreign_classes(files) else []


def foreign_code_warning(files: Mapping[str, bytes]) -> str:
    """The warning about processor files, contents by name, that ask for code of the base."""
    return f"code of the base is not copied ({', '.join(foreign_classes(files))}): {OWN_CLASSES}"


# What becomes of a processor that asked for code of the base.
OWN_CLASSES = "AutoProcessor uses the class of transformers, if it has one; compare what it makes of an image"


def _read(name: str, content: bytes) -> dict:
    """The JSON object in a file; a broken config of the tokenizer is not the processor's business."""
    config = read_object(content)
    if not config and name in NAMES and not _is_empty_object(content):
        raise CheckpointError(f"{name} is not a JSON object; download or save the processor again")
    return config


def _is_empty_object(content: bytes) -> bool:
    return re.fullmatch(rb"\s*\{\s*\}\s*", content) is not None


def _foreign(config: dict) -> Iterator[str]:
    """The classes of a processor for which a file asks code of the base; its parts may have an `auto_map` each."""
    for classes in values_of("auto_map", config):
        known = classes.items() if isinstance(classes, dict) else ()
        entries = [entry if isinstance(entry, list) else [entry] for auto, entry in known if auto != "AutoTokenizer"]
        yield from (str(name).rsplit("--", 1)[-1] for entry in entries for name in entry if name)
