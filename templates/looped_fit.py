"""Whether a loop fits a model: its depth, kinds of layers, what it does between them, and how requests are batched.

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
# In a `text_config`: how many of the last layers read keys and values of earlier layers, and store none.
REUSED_KEYS = "num_kv_shared_layers"
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
                f"and layers {body.hull.start} to {body.after} loop together; choose a span that starts at {count}, or "
                "mode layer"
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


def check_reused_keys(spec: LoopSpec, count, layer_types) -> None:
    """Raise ValueError if a path changes how often a layer runs whose keys the last layers of the model reuse.

    Args:
        count: the value of `REUSED_KEYS` in the config; None if it has none.
        layer_types: the config's `layer_types`; None if it has none.
    """
    if spec.path is None or spec.is_identity or not count or not layer_types:
        return
    storing = layer_types[: len(layer_types) - count]
    sources = {kind: layer for layer, kind in enumerate(storing)}.values()  # the last of each kind
    changed = [*spec.runs, *(layer for layer in spec.skipped(len(storing)) if layer in sources)]
    if changed:
        raise ValueError(
            f"the last {count} layers of the model reuse keys and values of layers {', '.join(map(str, sources))}, so "
            f"a path cannot run layer {min(changed)} again or leave it out; use spans"
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
        if layer_types[layer] not in MEMORYLESS_TYPES and layer_types.index(layer_types[layer]) == layer:
            raise ValueError(
                f"the path leaves out layer {layer}, the first one of type {layer_types[layer]}, whose cache says "
                "how many tokens there are; leave out another layer of that type"
            )


def check_paged(cache, spec: LoopSpec) -> None:
    """Check that a loop is exact in continuous batching, which packs prompts and decode steps of many requests.

    Raises:
        ValueError: it is not, and the cache is a paged one.
    """
    if type(cache).__name__.startswith("Paged"):
        check_continuous_batching(spec)


def check_continuous_batching(spec: LoopSpec) -> None:
    """Raise ValueError unless continuous batching gives each request what `generate` gives it alone."""
    if not spec.is_identity and (spec.kv != "shared" or spec.decode != "full"):
        raise ValueError(
            "continuous batching packs prompts and decode steps of several requests into one forward, which is exact "
            f"with kv shared and decode full only, not with kv {spec.kv} and decode {spec.decode}; use generate"
        )
