"""The answers of a base and its loop to the same items."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Answer:
    """What one model answered to one item.

    Attributes:
        score: the task's metric, larger is better; 0 or 1 for most tasks. It is 0 if `is_nan`.
        text: the chosen choice, or the generated text.
        loglikelihoods: of the choices, in nats, in their order; empty for generated text.
        tokens: number of tokens of generated text, counted by the tokenizer; 0 for a choice.
        truncated: whether generation stopped at its limit of tokens.
        lost: whether the text was generated from NaN.
    """

    score: float
    text: str
    loglikelihoods: tuple[float, ...] = ()
    tokens: int = 0
    truncated: bool = False
    lost: bool = False

    @property
    def is_nan(self) -> bool:
        """Whether the model computed NaN: it has not answered."""
        return self.lost or any(map(math.isnan, self.loglikelihoods))


@dataclass(frozen=True)
class Pair:
    """The answers of the base and of the loop to one item.

    Attributes:
        task, metric: names in lm-evaluation-harness.
        item: number of the item in its task.
        seed: the random seed of sampled generation; several seeds of one item are one problem.
        item_hash, prompt_hash: of the item and of the prompt, as lm-evaluation-harness computes them.
        prompt: the text that both models got.
        target: the right answer.
        base, loop: their answers.
    """

    task: str
    metric: str
    item: int
    seed: int
    item_hash: str
    prompt_hash: str
    prompt: str
    target: str
    base: Answer
    loop: Answer

    @property
    def difference(self) -> float:
        """Score of the loop minus score of the base."""
        return self.loop.score - self.base.score

    def to_dict(self) -> dict:
        """The pair as one JSON object. JSON has no NaN and no infinities: they become text."""
        values = asdict(self)
        for name in ("base", "loop"):
            numbers = values[name]["loglikelihoods"]
            values[name]["loglikelihoods"] = [each if math.isfinite(each) else str(each) for each in numbers]
        return values

    @classmethod
    def from_dict(cls, values: dict) -> Pair:
        """The pair that `to_dict` described."""
        answers = {
            name: Answer(**{**values[name], "loglikelihoods": tuple(map(float, values[name]["loglikelihoods"]))})
            for name in ("base", "loop")
        }
        return cls(**{**values, **answers})
