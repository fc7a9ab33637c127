"""A physically unrolled copy of a loaded model: each pass has layers, and so cache slots, of its own."""

from __future__ import annotations

import copy

import torch

# Fields of a config with one entry for each layer.
BY_LAYER = ("layer_types", "mlp_layer_types", "indexer_types")


def unrolled_copy(model, order):
    """A copy of a model that runs the layers with these numbers in this order."""
    copied = copy.deepcopy(model)
    layers = torch.nn.ModuleList(copy.deepcopy(model.model.layers[number]) for number in order)
    copied.model.layers = layers
    for place, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    copied.config.num_hidden_layers = len(order)
    for name in BY_LAYER:
        values = getattr(model.config, name, None)
        if values:
            setattr(copied.config, name, [values[number] for number in order])
    for module in copied.modules():  # a copy of a config may be shared by some modules only
        if hasattr(module, "config"):
            module.config = copied.config
    return copied
