"""Which Auto class of transformers loads a checkpoint."""

from __future__ import annotations

from typing import Any

from loopexport.templates.configuration_looped import MODEL_TYPE_PREFIX

from .families import is_multimodal

# The Auto classes of multimodal models and the tables of the families that they have, the first that fits counts.
MULTIMODAL = {
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",  # transformers 4 lacks it
}


def auto_class(config: dict) -> Any:
    """The Auto class that loads the whole model of the `config.json` of a base or an export.

    A class for text alone would leave out the vision tower of some multimodal families, and does not load others.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    names = MULTIMODAL if is_multimodal(config) else {}
    family = config["model_type"].removeprefix(MODEL_TYPE_PREFIX)
    fitting = (name for name, table in names.items() if family in getattr(modeling_auto, table, {}))
    return getattr(transformers, next(fitting, "AutoModelForCausalLM"))
