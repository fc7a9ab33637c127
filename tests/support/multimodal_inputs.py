"""Prompts with images or sounds for tiny multimodal models of any family.

Families differ in the shape of `pixel_values` and in what goes beside it. A `Recipe` makes one of those shapes; the
first one that a model's own tower accepts is the family's. The tower says how many placeholders an image needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from support.multimodal_configs import FIRST_SPECIAL_TOKEN
from support.multimodal_recipes import IMAGES, SOUNDS, Recipe

TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")  # 1 at placeholders


@dataclass(frozen=True)
class Medium:
    """What a tiny model takes beside text.

    Attributes:
        recipe: the name of the shape.
        kind: "image" or "audio".
        make: its arguments, for a number of images or sounds.
        placeholder: the token whose embeddings they replace.
        length: how many placeholders one of them needs.
        start, end: tokens around the placeholders.
        by_row: see `Recipe`.
    """

    recipe: str
    kind: str
    make: Callable[[int], dict]
    placeholder: int
    length: int
    start: int
    end: int
    by_row: bool = False


def find_medium(model) -> Medium:
    """What a multimodal model takes beside text: an image where it can.

    Raises:
        ValueError: no recipe fits, with the error of each.
    """
    errors = []
    for kind, recipes in (("image", IMAGES), ("audio", SOUNDS)):
        for name, recipe in recipes.items():
            medium = _medium(model, kind, name, recipe)
            if not _takes(model, medium):
                continue
            try:
                medium = replace(medium, length=_length(model, medium))
                _run(model, prompt(model, medium, [1]))
                return medium
            except Exception as error:  # a recipe of other families: a tower may raise anything
                errors.append(f"{name}: {type(error).__name__} {str(error)[:80]}")
    raise ValueError("; ".join(errors) or "no recipe")


def _medium(model, kind: str, name: str, recipe: Recipe) -> Medium:
    tower = _tower(model.config, kind)
    start, end = _around(model.config, kind)
    make = partial(recipe.make, tower)
    return Medium(name, kind, make, _placeholder(model.config, kind), 1, start, end, recipe.by_row)


def _takes(model, medium: Medium) -> bool:
    """Whether the model has arguments of these names."""
    features = _features(model, medium.kind)
    functions = [model.forward, *([features] if features else [])]
    return medium.make(1).keys() <= {name for each in functions for name in inspect.signature(each).parameters}


def _features(model, kind: str):
    """The model's function that computes the embeddings of images or sounds; None if it has none."""
    owners = (model.base_model, model)
    return next((f for each in owners if (f := getattr(each, f"get_{kind}_features", None)) is not None), None)


def _length(model, medium: Medium) -> int:
    """How many placeholders one image needs."""
    features = _features(model, medium.kind)
    if features is not None:
        try:
            return _counted(model, features, medium)
        except Exception as error:  # transformers 4 wants further arguments, or returns more than the embeddings
            return _searched(model, medium, error)
    return _searched(model, medium)


def _searched(model, medium: Medium, error: Exception | None = None) -> int:
    """The smallest number of placeholders for which the model's forward does not raise; else the error is raised."""
    for length in range(1, 70):
        try:
            _run(model, prompt(model, replace(medium, length=length), [1]))
        except Exception as raised:
            error = error or raised
        else:
            return length
    assert error is not None
    raise error


@torch.no_grad()
def _run(model, arguments: dict) -> None:
    """One forward. ValueError if it does not give one row of logits for each token."""
    count = model(**arguments, use_cache=False).logits.shape[1]
    if count != arguments["input_ids"].shape[1]:
        raise ValueError(f"{count} logits for {arguments['input_ids'].shape[1]} tokens")


@torch.no_grad()
def _counted(model, features, medium: Medium) -> int:
    """How many embeddings the tower makes of one image. ValueError if two do not make twice as many."""
    known = inspect.signature(features).parameters
    width = model.config.get_text_config().hidden_size
    arguments = ({key: value for key, value in medium.make(n).items() if key in known} for n in (1, 2))
    single, double = (_elements(features(**each)) // width for each in arguments)
    if not single or double != 2 * single:
        raise ValueError(f"{single} embeddings for one, {double} for two")
    return single


def _tower(config, kind: str):
    names = ("vision_config", "vq_config") if kind == "image" else ("audio_config", "encoder_config")
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), config)


def _elements(output) -> int:
    """How many numbers are in the features that a tower returns in one of its shapes."""
    pooled = getattr(output, "pooler_output", None)
    output = output if pooled is None else pooled
    if isinstance(output, torch.Tensor):
        return output.numel()
    if hasattr(output, "last_hidden_state"):
        return output.last_hidden_state.numel()
    output = output[0] if isinstance(output, tuple) and isinstance(output[0], (list, tuple)) else output
    return sum(each.numel() for each in output)


def _placeholder(config, kind: str) -> int:
    names = (f"{kind}_token_id", f"{kind}_token_index")
    values = (getattr(each, name, None) for each in (config, _tower(config, kind)) for name in names)
    found = next((value for value in values if value is not None), None)
    return FIRST_SPECIAL_TOKEN if found is None else found


def _around(config, kind: str) -> tuple[int, int]:
    """The tokens before and after an image, where the config names them; else plain ones."""
    starts = ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index")
    ends = ("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index")
    if kind == "audio":
        starts, ends = ("audio_start_token_id", "boa_token_id"), ("audio_end_token_id", "eoa_token_id")
    return tuple(next((v for n in names if (v := getattr(config, n, None)) is not None), 7) for names in (starts, ends))


def prompt(model, medium: Medium, rows: list[int], *, seed: int = 1, text: int = 5) -> dict:
    """Arguments of a forward: a batch whose rows have these numbers of images each, all of one length.

    Rows with fewer images have more text; the images stand behind the first two tokens.
    """
    most = max(rows)
    length = text + most * (medium.length + 2)
    ids = torch.randint(3, FIRST_SPECIAL_TOKEN - 10, (len(rows), length), generator=torch.Generator().manual_seed(seed))
    for row, count in enumerate(rows):
        for number in range(count):
            at = 2 + number * (medium.length + 2)
            ids[row, at] = medium.start
            ids[row, at + 1 : at + 1 + medium.length] = medium.placeholder
            ids[row, at + 1 + medium.length] = medium.end
    given = {} if not most else _by_row(medium, rows) if medium.by_row else medium.make(sum(rows))
    return with_types(model, medium, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given})


def _by_row(medium: Medium, rows: list[int]) -> dict:
    """Images of a batch in rows; rows with fewer of them end in empty images."""
    made = [medium.make(max(rows)) for _ in rows]
    given = {key: torch.cat([each[key] for each in made]) for key in made[0]}
    for row, count in enumerate(rows):
        for value in given.values():
            value[row, count:] = 0
    return given


def with_types(model, medium: Medium, arguments: dict, prompt_length: int | None = None) -> dict:
    """The arguments with the token types that the model's forward takes, which mark placeholders."""
    known = inspect.signature(model.forward).parameters
    types = (arguments["input_ids"] == medium.placeholder).long()
    if model.config.model_type == "paligemma":  # 0: attends in both directions, as all of a prompt does
        types = (torch.arange(types.shape[1]) >= (prompt_length or types.shape[1])).long().repeat(len(types), 1)
    arguments = arguments | {name: types for name in TYPES if name in known}
    if model.config.model_type == "idefics" and "pixel_values" in arguments:
        rows, tokens = arguments["input_ids"].shape
        arguments["image_attention_mask"] = torch.ones(rows, tokens, arguments["pixel_values"].shape[1])
    return arguments | (_cross_mask(arguments) if "cross_attention_mask" in known else {})


def _cross_mask(arguments: dict) -> dict:
    """Each token attends to all tiles of its row: `(batch, tokens, images, tiles)`."""
    if "aspect_ratio_mask" not in arguments:
        return {}
    tiles = arguments["aspect_ratio_mask"]
    return {"cross_attention_mask": tiles[:, None].repeat(1, arguments["input_ids"].shape[1], 1, 1)}


def for_longer(model, medium: Medium, arguments: dict, ids: torch.Tensor) -> dict:
    """The same prompt with more text behind it: `ids` has all tokens."""
    length = arguments["input_ids"].shape[1]
    more = ids.shape[1] - length
    mask = torch.cat([arguments["attention_mask"], torch.ones(len(ids), more, dtype=torch.long)], dim=1)
    return with_types(model, medium, {**arguments, "input_ids": ids, "attention_mask": mask}, length)


def behind_padding(model, medium: Medium, arguments: dict, padding: int = 3) -> dict:
    """The same prompt behind padding."""
    ids, mask = arguments["input_ids"], arguments["attention_mask"]
    zeros = torch.zeros(len(ids), padding, dtype=torch.long)
    longer = {"input_ids": torch.cat([zeros, ids], 1), "attention_mask": torch.cat([zeros, mask], 1)}
    return with_types(model, medium, {**arguments, **longer})


def key_of_medium(arguments: dict) -> str:
    """The argument that holds the images or sounds."""
    return next(key for key in arguments if "pixel_values" in key or "input_features" in key)
