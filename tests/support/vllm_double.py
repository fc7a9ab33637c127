"""A small double of vLLM's Transformers backend; it needs no vLLM, and can split requests into any steps.

vLLM keeps keys and values in its own attention layers. It attaches one to each attention module, switches the model to
evaluation, and gives a K/V cache to every attention layer that is registered by name in the engine's settings then. It
calls the model without cache and mask, on one row that holds the next tokens of several requests. An attention layer
writes the keys and values that it gets into the slots of their tokens, and attends then.
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM


class Attention(nn.Module):
    """An attention layer of vLLM: it stores each request's keys and values, `(kv_heads, length, head_size)`.

    Args:
        owner: the attention module of the model.
        config: the model's config.
        number: the layer's number.
        batch: what the current call holds.
    """

    def __init__(self, owner: nn.Module, config, number: int, batch: Batch):
        super().__init__()
        heads = config.num_attention_heads
        is_latent = hasattr(config, "kv_lora_rank")  # their keys and values are expanded to all heads
        self.num_heads = heads
        self.num_kv_heads = heads if is_latent else getattr(config, "num_key_value_heads", None) or heads
        self.scale, self.soft_cap = owner.scaling, getattr(config, "attn_logit_softcapping", None)
        self.window = _window(config, number)
        self.sinks = [owner.sinks] if hasattr(owner, "sinks") else []  # in a list: not a parameter of ours
        self.layer_name = f"model.layers.{number}.self_attn.attn"
        self.batch, self.stored = batch, {}

    def forward(self, query, key, value):
        """Attend for all tokens of the batch.

        Args:
            query: `(tokens, heads * head_size)`.
            key, value: `(tokens, kv_heads * head_size)`.

        Returns:
            `(tokens, heads * head_size)`.
        """
        answers, row = [], 0
        for request, start, length in self.batch.parts:
            rows = slice(row, row + length)
            new = [self._heads(each[rows], self.num_kv_heads) for each in (key, value)]
            past = [each[:, :start] for each in self.stored[request]] if start else [each[:, :0] for each in new]
            self.stored[request] = [torch.cat(both, dim=1) for both in zip(past, new, strict=True)]
            answers.append(self._attend(self._heads(query[rows], self.num_heads), start, *self.stored[request]))
            row += length
        return torch.cat(answers)

    def _heads(self, rows, heads):
        return rows.view(rows.shape[0], heads, -1).transpose(0, 1)

    def _attend(self, query, start, key, value):
        group = self.num_heads // self.num_kv_heads
        scores = query @ key.repeat_interleave(group, 0).transpose(1, 2) * self.scale
        if self.soft_cap:
            scores = torch.tanh(scores / self.soft_cap) * self.soft_cap
        distance = torch.arange(start, start + query.shape[1])[:, None] - torch.arange(key.shape[1])
        scores = scores.masked_fill((distance < 0) | (distance >= self.window), -math.inf)
        for sinks in self.sinks:
            scores = torch.cat([scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)], dim=-1)
        weights = scores.softmax(dim=-1)[..., : key.shape[1]]
        return (weights @ value.repeat_interleave(group, 0)).transpose(0, 1).flatten(1)


def _window(config, number: int) -> float:
    """Number of positions that a layer sees."""
    types = getattr(config, "layer_types", None)
    slides = types[number] == "sliding_attention" if types else getattr(config, "sliding_window", None) is not None
    return config.sliding_window if slides else math.inf


@dataclass
class Batch:
    """The tokens of one call.

    Attributes:
        parts: for each request in it, in order: request number, first position, number of tokens.
    """

    parts: tuple = ()


def attention_forward(module, query, key, value, attention_mask, **kwargs):
    """What vLLM registers in transformers as attention function "vllm"."""
    query, key, value = (each.transpose(1, 2).reshape(query.shape[2], -1) for each in (query, key, value))
    attention = module.attn if hasattr(module, "attn") else module.elsewhere
    return attention.forward(query, key, value), None


def settings(**changes):
    """The part of the engine's config that a looped model reads, with changes by field name."""

    def part(**fields):
        return SimpleNamespace(**fields | {name: changes.pop(name) for name in fields.keys() & changes.keys()})

    return SimpleNamespace(
        parallel_config=part(pipeline_parallel_size=1, data_parallel_size=1, enable_expert_parallel=False),
        model_config=part(max_model_len=128, enforce_eager=True, use_mla=False),
        scheduler_config=part(enable_chunked_prefill=True),
        cache_config=part(enable_prefix_caching=True),
        device_config=part(device_type="cpu"),
        compilation_config=SimpleNamespace(static_forward_context={}),
        **{"quant_config": None, "speculative_config": None, "lora_config": None, **changes},
    )


class Engine:
    """A loaded model and its attention layers.

    Args:
        export: the export's directory.
        monkeypatch: replaces vLLM's config module during the test.
        attribute: where attention modules get their attention layers: "attn", as in vLLM, or "elsewhere".
        **changes: see `settings`.
    """

    def __init__(self, export, monkeypatch, attribute="attn", **changes):
        engine = settings(**changes)
        vllm = {"config": ("get_current_vllm_config", engine), "forward_context": ("get_forward_context", self)}
        for name, (function, answer) in vllm.items():
            module: Any = ModuleType(f"vllm.{name}")
            setattr(module, function, lambda answer=answer: answer)
            monkeypatch.setitem(sys.modules, f"vllm.{name}", module)
        AttentionInterface.register("vllm", attention_forward)
        self.model = AutoModelForCausalLM.from_pretrained(
            export, trust_remote_code=True, attn_implementation="vllm", dtype=torch.float32
        )
        self.batch = Batch()
        self.layers = engine.compilation_config.static_forward_context
        for module in [*self.model.modules()]:
            if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "scaling"):
                attention = Attention(module, self.model.config, module.layer_idx, self.batch)
                setattr(module, attribute, attention)
                self.layers[attention.layer_name] = attention
        self.model.eval()
        for attention in self.layers.values():
            attention.stored = {}

    @property
    def attn_metadata(self):
        """What vLLM says about the requests of this call, by the name of the attention layer."""
        starts = torch.tensor([0, *itertools.accumulate(length for _, _, length in self.batch.parts)])
        ends = torch.tensor([start + length for _, start, length in self.batch.parts])
        return dict.fromkeys(self.layers, SimpleNamespace(query_start_loc=starts, seq_lens=ends))

    @torch.no_grad()
    def logits(self, prompts, steps):
        """Logits of all tokens of each prompt, `(1, length, vocab)` each.

        Args:
            prompts: one row of token ids, `(1, length)`, for each request.
            steps: for each call, pairs of a request's number and the number of its next tokens.
        """
        done, answers = [0] * len(prompts), [[] for _ in prompts]
        for step in steps:
            self.batch.parts = tuple((request, done[request], length) for request, length in step)
            rows = [prompts[request][:, start : start + length] for request, start, length in self.batch.parts]
            positions = [torch.arange(start, start + length)[None] for _, start, length in self.batch.parts]
            row, tokens = torch.cat(rows, dim=1), torch.cat(positions, dim=1)
            logits = self.model(input_ids=row, position_ids=tokens, use_cache=False).logits
            for (request, _, length), part in zip(
                self.batch.parts, logits.split([length for _, _, length in self.batch.parts], dim=1), strict=True
            ):
                answers[request].append(part)
                done[request] += length
        return [torch.cat(parts, dim=1) for parts in answers]
