"""Prompts with images or sounds for tiny multimodal models of any family.

Families differ in the shape of `pixel_values` and in what goes beside it. A `Recipe` makes one of those shapes; the
first one that a model's own tower accepts is the family's. The tower says how many placeholders an image needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from support.multimodal_configs import FIRST_SPECIAL_TOKEN

SIZE, PATCH, PATCHES, MEL, FRAMES = 32, 8, 16, 80, 64
TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")  # 1 at placeholders


class Recipe(NamedTuple):
    """A shape of inputs: what the model gets for some images or sounds.

    Attributes:
        make: the arguments for a number of images, given the config of the tower.
        by_row: whether the tensors have a row for each row of the batch, and not for each image.
    """

    make: Callable[[object, int], dict]
    by_row: bool = False


def _value(config, *names: str, default: int) -> int:
    """The first of a config's fields that is a number; of a pair, its first number."""
    for name in names:
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, int):
            return value
    return default


def _size(tower) -> int:
    return _value(tower, "image_size", default=SIZE)


def _patch(tower) -> int:
    return _value(tower, "model_patch_size", "patch_size", default=PATCH)


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def _plain(tower, count):
    return {"pixel_values": _noise(count, 3, _size(tower), _size(tower))}


def _flat_patches(tower, count, side=4):
    depth = _value(tower, "temporal_patch_size", default=1)
    pixels = _noise(count * side * side, 3 * depth * _patch(tower) ** 2)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]] * count)}


def _square_patches(tower, count):
    flat = _flat_patches(tower, count)
    return flat | {"pixel_values": _noise(count * 16, 3, _patch(tower), _patch(tower))}


def _with_sizes(tower, count):
    return _plain(tower, count) | {"image_sizes": torch.tensor([[_size(tower)] * 2] * count)}


def _tiles(tower, count, tiles=3):
    size = _size(tower)
    return {
        "pixel_values": _noise(count, tiles, 3, size, size),
        "image_sizes": torch.tensor([[size, 2 * size]] * count),
    }


def _five_tiles(tower, count):
    size = 2 * _size(tower)
    return _tiles(tower, count, 5) | {"image_sizes": torch.tensor([[size, size]] * count)}


def _rows_of_images(tower, count):
    size = _size(tower)
    mask = torch.ones(1, count, size, size, dtype=torch.long)
    return {"pixel_values": _noise(1, count, 3, size, size), "pixel_attention_mask": mask}


def _positioned_patches(tower, count, side=6):
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1).reshape(-1, 2)
    pixels = _noise(count, side * side, 3 * _patch(tower) ** 2)
    return {"pixel_values": pixels.sigmoid(), "image_position_ids": places.repeat(count, 1, 1)}


def _masked_patches(tower, count, side=4):
    pixels = _noise(count, side * side, 3 * _patch(tower) ** 2)
    mask = torch.ones(count, side * side, dtype=torch.long)
    return {
        "pixel_values": pixels,
        "spatial_shapes": torch.tensor([[side, side]] * count),
        "pixel_attention_mask": mask,
    }


def _merged_patches(tower, count):
    return _flat_patches(tower, count) | {"image_merge_sizes": torch.tensor([2] * count)}


def _tiles_by_row(tower, count):
    size = _size(tower)
    return {
        "pixel_values": _noise(1, count, 3, size, size),
        "pixel_attention_mask": torch.ones(1, count, dtype=torch.bool),
    }


def _images_by_row(tower, count):
    return {"pixel_values": _noise(1, count, 3, _size(tower), _size(tower))}


def _patches_by_row(tower, count):
    return {"pixel_values": _noise(count, PATCHES, 3 * _patch(tower) ** 2)}


def _crossed_tiles(tower, count, tiles=4):
    size = _size(tower)
    return {
        "pixel_values": _noise(1, count, tiles, 3, size, size),
        "aspect_ratio_ids": torch.ones(1, count, dtype=torch.long),
        "aspect_ratio_mask": torch.tensor([1] + [0] * (tiles - 1)).repeat(1, count, 1),
    }


def _strip_of_patches(tower, count, side=8):
    pixels = _noise(1, 3, _patch(tower), count * side * side * _patch(tower))
    return {"pixel_values": pixels, "target_sizes": torch.tensor([[side, side]] * count)}


def _crops(tower, count):
    size, side = _size(tower), _size(tower) // _patch(tower)
    return {
        "image_pixel_values": _noise(count, 2, 3, size, size),
        "image_sizes": torch.tensor([[size, size]] * count),
        "image_attention_mask": torch.ones(count, 2, side, side, dtype=torch.long),
    }


def _high_and_low(tower, count):
    return _plain(tower, count) | {"high_res_pixel_values": _noise(count, 3, _size(tower), _size(tower))}


def _sound(tower, count):
    mel = _value(tower, "num_mel_bins", "input_dim", default=MEL)
    return {"input_features": _noise(count, mel, FRAMES)}


def _sound_by_frames(tower, count):
    mel = _value(tower, "num_mel_bins", "input_dim", default=MEL)
    return {"input_features": _noise(count, FRAMES, mel)}


def _masked_sound(tower, count):
    return _sound(tower, count) | {"feature_attention_mask": torch.ones(count, FRAMES, dtype=torch.long)}


def _input_masked_sound(tower, count):
    return _sound(tower, count) | {"input_features_mask": torch.ones(count, FRAMES, dtype=torch.bool)}


IMAGES: dict[str, Recipe] = {
    "patches of a grid": Recipe(_flat_patches),
    "square patches of a grid": Recipe(_square_patches),
    "patches to merge": Recipe(_merged_patches),
    "patches with positions": Recipe(_positioned_patches),
    "patches with a mask": Recipe(_masked_patches),
    "a strip of patches": Recipe(_strip_of_patches),
    "crops": Recipe(_crops),
    "images by row": Recipe(_rows_of_images, by_row=True),
    "tiles by row": Recipe(_tiles_by_row, by_row=True),
    "tiles to attend to": Recipe(_crossed_tiles, by_row=True),
    "tiles": Recipe(_tiles),
    "five tiles": Recipe(_five_tiles),
    "images with sizes": Recipe(_with_sizes),
    "images in two resolutions": Recipe(_high_and_low),
    "images": Recipe(_plain),
    "rows of images": Recipe(_images_by_row, by_row=True),
    "rows of patches": Recipe(_patches_by_row),
}
SOUNDS: dict[str, Recipe] = {
    "masked sounds": Recipe(_masked_sound),
    "sounds with a mask": Recipe(_input_masked_sound),
    "sounds": Recipe(_sound),
    "sounds by frame": Recipe(_sound_by_frames),
}


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
