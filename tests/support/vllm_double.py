"""A small double of vLLM's Transformers backend; it needs no vLLM, and can split requests into any steps.

vLLM keeps keys and values in its own attention layers, one for each number below `num_hidden_layers`. New releases
attach them to the modules of that number; older ones (0.28, for example) pass them as an argument. vLLM calls the model
without cache and mask, on one row that holds the next tokens of several requests. An attention layer that gets keys and
values stores them before it attends; one that gets none attends to the stored ones.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM

SEAMS = ("module", "argument")
ATTRIBUTES = {"module": "attn", "elsewhere": "vllm_attention"}  # no release has the second one


class Attention(nn.Module):
    """An attention layer of vLLM: it stores each request's keys and values, `(kv_heads, length, head_size)`.

    Args:
        owner: the attention module of the model.
        config: the model's config.
        number: the layer's number.
        batch: what the current call holds.
        sinks: whether to use the module's attention sinks.
    """

    def __init__(self, owner: nn.Module, config, number: int, batch: Batch, sinks: bool):
        super().__init__()
        heads = config.num_attention_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.num_heads, self.num_kv_heads = heads, getattr(config, "num_key_value_heads", None) or heads
        self.scale, self.soft_cap = owner.scaling, getattr(config, "attn_logit_softcapping", None)
        self.window = _window(config, number)
        self.sinks = [owner.sinks] if sinks and hasattr(owner, "sinks") else []  # in a list: not a parameter of ours
        self.has_sink = bool(self.sinks)
        self.batch, self.stored = batch, {}

    def forward(self, query, key, value):
        """Attend for all tokens of the batch.

        Args:
            query: `(tokens, heads * head_size)`.
            key, value: `(tokens, kv_heads * head_size)`, or None to attend to the stored ones alone.

        Returns:
            `(tokens, heads * head_size)`.
        """
        answers, row = [], 0
        for request, start, length in self.batch.parts:
            rows = slice(row, row + length)
            if key is not None:
                past = [each[:, :start] for each in self.stored[request]] if start else None
                new = [self._heads(each[rows], self.num_kv_heads) for each in (key, value)]
                self.stored[request] = [torch.cat(both, dim=1) for both in zip(past, new, strict=True)] if past else new
            answers.append(self._attend(self._heads(query[rows], self.num_heads), start, *self.stored[request]))
            row += length
        return torch.cat(answers)

    def _heads(self, rows, heads):
        return rows.view(rows.shape[0], heads, self.head_size).transpose(0, 1)

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


def attention_forward(module, query, key, value, attention_mask, attention_instances=None, **kwargs):
    """What vLLM registers in transformers as attention function "vllm"."""
    here = [getattr(module, name) for name in ATTRIBUTES.values() if hasattr(module, name)]
    attention = here[0] if attention_instances is None else attention_instances[module.layer_idx]
    query, key, value = (each.transpose(1, 2).reshape(query.shape[2], -1) for each in (query, key, value))
    return attention.forward(query, key, value), None


def settings(**changes):
    """The part of the engine's config that a looped model reads, with changes by field name."""
    parallel = {"pipeline_parallel_size": 1, "enable_expert_parallel": False}
    parallel |= {name: changes.pop(name) for name in parallel.keys() & changes.keys()}
    others = {"quant_config": None, "speculative_config": None, "lora_config": None}
    model = {"max_model_len": 128, "enforce_eager": True}
    model |= {name: changes.pop(name) for name in model.keys() & changes.keys()}
    others["model_config"] = SimpleNamespace(**model)
    return SimpleNamespace(parallel_config=SimpleNamespace(**parallel), **{**others, **changes})


class Engine:
    """A loaded model and its attention layers.

    Args:
        export: the export's directory.
        monkeypatch: replaces vLLM's config module during the test.
        seam: how the model gets its attention layers, one of `SEAMS`; "elsewhere" for a way that no release has.
        sinks: whether the attention layers use sinks.
        **changes: see `settings`.
    """

    def __init__(self, export, monkeypatch, seam="module", sinks=True, **changes):
        config = ModuleType("vllm.config")
        config.get_current_vllm_config = lambda: settings(**changes)
        monkeypatch.setitem(sys.modules, "vllm.config", config)
        AttentionInterface.register("vllm", attention_forward)
        self.model = AutoModelForCausalLM.from_pretrained(
            export, trust_remote_code=True, attn_implementation="vllm", dtype=torch.float32
        ).eval()
        self.batch = Batch()
        owners = {
            each.layer_idx: each
            for each in self.model.modules()
            if isinstance(getattr(each, "layer_idx", None), int) and hasattr(each, "scaling")
        }
        self.layers = {
            number: Attention(owners[number], self.model.config, number, self.batch, sinks)
            for number in range(self.model.config.num_hidden_layers)
        }
        self.arguments = {"attention_instances": self.layers} if seam == "argument" else {}
        for number, attention in self.layers.items() if seam in ATTRIBUTES else ():
            setattr(owners[number], ATTRIBUTES[seam], attention)

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
            logits = self.model(input_ids=row, position_ids=tokens, use_cache=False, **self.arguments).logits
            for (request, _, length), part in zip(
                self.batch.parts, logits.split([length for _, _, length in self.batch.parts], dim=1), strict=True
            ):
                answers[request].append(part)
                done[request] += length
        return [torch.cat(parts, dim=1) for parts in answers]
