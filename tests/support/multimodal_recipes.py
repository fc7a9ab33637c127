"""Shapes in which multimodal families take images and sounds, as recipes that make random ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

SIZE, PATCH, PATCHES, MEL, FRAMES = 32, 8, 16, 80, 64


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
