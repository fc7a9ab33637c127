"""Whether a loop fits a model: its depth, the kinds of its layers, and what the model does between them.

Every export has a copy of this file. It needs only the standard library.
"""

from __future__ import annotations

from .looped_path import layers_of
from .looped_spec import LoopSpec

# Names in `layer_types` of native configs for layers whose only memory is a K/V cache, of an indexer's keys too.
ATTENTION_TYPES = ("attention", "full_attention", "sliding_attention", "chunked_attention", "indexed_attention")

# The same for layers that keep a recurrent state, alone or beside keys and values; and for layers without a memory.
RECURRENT_TYPES = ("linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding")
MEMORYLESS_TYPES = ("mlp", "moe")
# And for layers that pool several tokens into one key, and keep the tokens of an unfinished pool too.
POOLING_TYPES = ("heavily_compressed_attention", "compressed_sparse_attention")
LOOPABLE_TYPES = ATTENTION_TYPES + RECURRENT_TYPES + MEMORYLESS_TYPES + POOLING_TYPES

# In a `vision_config`: layers of the tower whose features the model adds to outputs of as many first decoder layers.
ADDED_FEATURES = "deepstack_visual_indexes"
# In a `text_config`: the layers that attend to an image instead of the text.
CROSS_ATTENTION = "cross_attention_layers"


def check_depth(spec: LoopSpec, num_layers: int) -> None:
    """Raise ValueError unless the loop fits a model of `num_layers` decoder layers."""
    if spec.path is not None:
        _check_depth_of_path(spec, num_layers)
        return
    start, stop = spec.spans[-1]
    if stop > num_layers:
        raise ValueError(
            f"span {start}:{stop} ends outside the model, which has {num_layers} layers; "
            f"a span is half-open and can end at {num_layers} at most"
        )


def _check_depth_of_path(spec: LoopSpec, num_layers: int) -> None:
    last = max(layers_of(spec.path or ()))
    if last >= num_layers:
        raise ValueError(f"the path visits layer {last}, and the model has layers 0 to {num_layers - 1}")
    if spec.skipped(num_layers) and spec.decode != "full":
        raise ValueError(
            f"the path leaves out layer {spec.skipped(num_layers)[0]}, so decode steps cannot run the base model "
            f"on its cache, as decode {spec.decode} asks; use decode full"
        )


def check_added_features(spec: LoopSpec, vision_layers) -> None:
    """Raise ValueError if the model adds features of images inside of what loops: iterations would miss them.

    Args:
        vision_layers: the value of `ADDED_FEATURES` in the config; None if it has none.
    """
    count = len(vision_layers) if isinstance(vision_layers, (list, tuple)) else 0
    for body in spec.bodies:
        if body.hull.start < min(body.after, count):
            raise ValueError(
                f"the model adds features of images to the hidden states after each of its first {count} layers, "
                f"inside span {body.hull.start}:{body.hull.stop}; choose a span that starts at {count}, or mode "
                "layer"
            )


def check_cross_attention(spec: LoopSpec, crossed) -> None:
    """Raise ValueError if a looped layer attends to an image: the model skips it where there is none.

    Args:
        crossed: the numbers of such layers, the value of `CROSS_ATTENTION` in the config; None if it has none.
    """
    found = [layer for layer in spec.layers if isinstance(crossed, (list, tuple)) and layer in crossed]
    if found:
        raise ValueError(
            f"layer {found[0]} attends to an image, and the model skips it for text alone, so it cannot be run "
            f"again; choose a span without layers {', '.join(map(str, crossed))}"
        )


def check_layer_types(spec: LoopSpec, layer_types) -> None:
    """Raise ValueError if a looped layer has a memory of unknown kind.

    Args:
        layer_types: the config's `layer_types` or `layers_block_type`, one name per layer; None if it has none.
    """
    if not isinstance(layer_types, (list, tuple)) or len(layer_types) <= max([0, *spec.layers]):
        return
    _check_first_of_type(spec, layer_types)
    for layer in spec.layers:
        if layer_types[layer] in POOLING_TYPES and spec.kv == "reference" and not spec.is_identity:
            raise ValueError(
                f"layer {layer} is of type {layer_types[layer]}: it pools several tokens into one key, and a pool "
                "cannot join natural tokens with an iterate's, as kv reference asks; use kv shared or per_step"
            )
        if layer_types[layer] not in LOOPABLE_TYPES:
            raise ValueError(
                f"layer {layer} is of type {layer_types[layer]}; only layers of types {', '.join(LOOPABLE_TYPES)} "
                "can be run again: choose a span of those"
            )


def _check_first_of_type(spec: LoopSpec, layer_types) -> None:
    """Raise ValueError if a path leaves out the first layer of a type: the model sizes masks by its cache slot."""
    for layer in spec.skipped(len(layer_types)):
        if layer_types.index(layer_types[layer]) == layer:
            raise ValueError(
                f"the path leaves out layer {layer}, the first one of type {layer_types[layer]}, whose cache says "
                "how many tokens there are; leave out another layer of that type"
            )
