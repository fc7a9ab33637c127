"""With `--backend vllm`, each arm is an engine of its own, and all items of one come before those of the next."""

from __future__ import annotations

from typing import ClassVar

import pytest

from loopexport import LoopSpec, plan_compare
from support.evaluation import tokenized_base, write_items

pytest.importorskip("lm_eval")
LOOP = LoopSpec(span=(2, 4), steps=3, anchor=0.25)


class Engine:
    """Stands for lm-evaluation-harness's vLLM model: the base prefers the first choice, a loop the last."""

    made: ClassVar[list[dict]] = []
    rank, world_size = 0, 1

    @classmethod
    def create_from_arg_obj(cls, values, additional):
        cls.made.append({**values, **additional})
        return cls(values["hf_overrides"]["loop_steps"])

    def __init__(self, steps: int):
        self.steps = steps

    def loglikelihood(self, requests, disable_tqdm):
        sign = -1 if self.steps == 1 else 1
        return [(float(sign * each.idx), False) for each in requests]

    def tok_encode(self, text, add_special_tokens):
        return text.split()


@pytest.fixture
def engines(monkeypatch):
    from lm_eval.api import registry

    monkeypatch.setattr(Engine, "made", [])
    monkeypatch.setattr(registry, "get_model", lambda name: Engine)
    return Engine.made


def test_base_and_loop_are_engines_one_after_the_other(tmp_path, engines):
    base = tokenized_base("llama", tmp_path / "base")
    items = write_items(tmp_path / "mine.jsonl", 9)
    settings = {"backend": "vllm", "batch_size": 2, "dtype": "bfloat16", "model_args": {"tensor_parallel_size": 2}}
    result = plan_compare(base, LOOP, items=items, **settings).run()
    assert all(pair.base.text == first(pair) for pair in result.pairs)
    assert all(pair.loop.text != pair.base.text for pair in result.pairs)
    steps = [each["hf_overrides"]["loop_steps"] for each in engines]
    assert steps == [1, 3, 1]  # the last one measures the floor
    loop = engines[1]
    assert (loop["hf_overrides"]["loop_anchor"], loop["tensor_parallel_size"], loop["dtype"]) == (0.25, 2, "bfloat16")
    assert loop["trust_remote_code"] is True
    assert "device" not in loop


def first(pair) -> str:
    """The first choice of an item, as `write_items` wrote it."""
    words = ("12345", "67890", "it", "isn't", "and", "is")
    return words[pair.item % len(words)]
