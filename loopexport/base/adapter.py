"""An adapter of PEFT beside a base. Where peft is installed, transformers loads it unasked; an export never has it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from loopexport.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")  # of a whole model

MERGE = "load it with peft, then `merge_and_unload()` and `save_pretrained`"


def check_adapter(model: str, names: Collection[str], read_config: Callable[[], dict], is_ignored: bool) -> None:
    """Check that a base is a whole model without an adapter.

    Args:
        model: the base as the user gave it.
        names: its files.
        read_config: reads its `adapter_config.json`.
        is_ignored: whether to go on with the weights alone if there are any.

    Raises:
        CheckpointError: there is only an adapter, or one that is not ignored; the message says how to merge it.
    """
    if CONFIG not in names:
        return
    is_alone = not any(WEIGHTS.fullmatch(name) for name in names)
    if not is_alone and is_ignored:
        return
    base = read_config().get("base_model_name_or_path")
    adapter = f"an adapter for {base}" if isinstance(base, str) and base else "an adapter"
    if is_alone:
        raise CheckpointError(f"{model} holds only {adapter}; {MERGE}, and convert the result")
    raise CheckpointError(
        f"{model} holds {adapter} ({CONFIG}), which transformers loads with peft and an export would lack; {MERGE}, "
        "and convert the result, or loop the weights without it by --without-adapter (in Python without_adapter=True)"
    )
