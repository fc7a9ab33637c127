"""Hooks that record what a layer caches and overwrite it, for the oracle: keys and values, and an indexer's keys."""

from __future__ import annotations

import torch


def projection_hooks(layer, number, record, force):
    """Record the outputs of a layer's projections to what it caches, and overwrite them by what `force` returns.

    Args:
        layer: the decoder layer.
        number: its number; the key of its keys and values. `(number, "index")` is the key of its indexer's keys.
        record: where to record, a list of tensors `(batch, seq, ...)` for each key.
        force: takes a key and the outputs, and returns what replaces them; None replaces nothing.
    """
    attention = next(getattr(layer, name) for name in ("self_attn", "attn", "attention") if hasattr(layer, name))
    hooks = _index_hooks(attention, (number, "index"), record, force)
    if hasattr(attention, "k_proj"):
        return hooks + _separate_hooks(attention, number, record, force)
    fused, split, join = _fused(attention)

    def replace(module, args, output):
        rest, own = split(output)
        record[number] = own
        return None if force is None else join(rest, force(number, own))

    return [*hooks, fused.register_forward_hook(replace)]


def _index_hooks(attention, key, record, force):
    indexer = getattr(attention, "indexer", None)
    if indexer is None:
        return []
    # Qwen4-Exp projects to the queries and the key at once.
    fused = hasattr(indexer, "index_qk_proj")
    projection, width = (indexer.index_qk_proj, indexer.index_head_dim) if fused else (indexer.wk, indexer.head_dim)

    def replace(module, args, output):
        queries, own = output.split([output.shape[-1] - width, width], dim=-1)
        record[key] = [own]
        return None if force is None else torch.cat([queries, *force(key, [own])], dim=-1)

    return [projection.register_forward_hook(replace)]


def _separate_hooks(attention, number, record, force):
    own = {}

    def key(module, args, output):
        own["key"] = output
        return None if force is None else force(number, [output, output])[0]

    def value(module, args, output):
        record[number] = [own["key"], output]
        return None if force is None else force(number, [output, output])[1]

    return [attention.k_proj.register_forward_hook(key), attention.v_proj.register_forward_hook(value)]


def _fused(attention):
    """The projection that makes keys and values; a function that splits its output into (rest, [parts]), and a join."""
    config = attention.config
    if hasattr(attention, "kv_a_proj_with_mqa"):  # MLA: the whole output
        return attention.kv_a_proj_with_mqa, lambda output: (None, [output]), lambda rest, own: own[0]
    if hasattr(attention, "c_attn"):  # GPT-2: queries, keys, values
        return (
            attention.c_attn,
            lambda output: (output.chunk(3, dim=-1)[0], list(output.chunk(3, dim=-1)[1:])),
            lambda rest, own: torch.cat([rest, *own], dim=-1),
        )
    if hasattr(attention, "query_key_value"):  # GPT-NeoX: the same for each head
        heads = config.num_attention_heads

        def split(output):
            query, *own = output.unflatten(-1, (heads, 3, -1)).unbind(-2)
            return query, own

        return (
            attention.query_key_value,
            split,
            lambda rest, own: torch.stack([rest, *own], dim=-2).flatten(-3),
        )
    groups, heads = config.num_key_value_heads, config.num_attention_heads  # Phi-3
    width = attention.qkv_proj.out_features // (heads + 2 * groups)

    def split_groups(output):
        query, *own = output.split([heads * width, groups * width, groups * width], dim=-1)
        return query, own

    return attention.qkv_proj, split_groups, lambda rest, own: torch.cat([rest, *own], dim=-1)
