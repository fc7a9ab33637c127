"""Options that would have no effect on the tasks at hand are refused, since a result names them as used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loopexport.errors import EvaluationError

from .tasks import Prompting

TOKEN_LIMIT = "max_gen_toks"
# Names of the most tokens that a model may generate; where a task has several, lm-evaluation-harness takes the first.
TOKEN_LIMITS = (TOKEN_LIMIT, "max_new_tokens", "max_tokens", "max_completion_tokens")
SHOWN = 3  # names of tasks in a message


def with_token_limit(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of generation with a limit of tokens under the name that wins over a task's own.

    Raises:
        EvaluationError: there are two limits, or one is no number of tokens.
    """
    given = {name: generation[name] for name in TOKEN_LIMITS if name in generation}
    if len(given) > 1:
        raise EvaluationError(f"generation has {' and '.join(given)}, which mean the same; give one of them")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise EvaluationError(f"generation {name}={value} must be a whole number of tokens, at least 1")
    return {TOKEN_LIMIT if name in given else name: value for name, value in generation.items()}


def check_effects(tasks: Mapping[str, Any], prompting: Prompting) -> None:
    """Refuse options that lm-evaluation-harness would ignore without a word.

    Args:
        tasks: of lm-evaluation-harness, by name.
        prompting: how to ask them.

    Raises:
        EvaluationError: a task cannot have examples, none generates text, or one that generates does not sample.
    """
    if prompting.num_fewshot:
        _check_examples(tasks, prompting.num_fewshot)
    if prompting.generation:
        _check_generation(tasks, prompting.generation)


def _check_examples(tasks: Mapping[str, Any], num_fewshot: int) -> None:
    without = [name for name, task in tasks.items() if task.get_config("num_fewshot") == 0]
    if without:
        raise EvaluationError(
            f"num_fewshot {num_fewshot} has no effect on {_names(without)}: num_fewshot 0 in a task means that it "
            "cannot have examples; leave out --num-fewshot, or such tasks"
        )


def _check_generation(tasks: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
    generating = [name for name, task in tasks.items() if task.get_config("output_type") == "generate_until"]
    if not generating:
        raise EvaluationError(
            f"generation {dict(generation)} has no effect: no model generates text for {_names(tasks)}; leave out "
            "--generation"
        )
    greedy = [name for name in generating if _is_greedy(tasks[name], generation)]
    temperature = generation.get("temperature")
    if greedy and isinstance(temperature, (int, float)) and temperature > 0:
        raise EvaluationError(
            f"temperature {temperature:g} has no effect on {_names(greedy)}, where do_sample is false; make the models "
            f"sample with --generation do_sample=true,temperature={temperature:g}, or leave it out"
        )


def _is_greedy(task: Any, generation: Mapping[str, Any]) -> bool:
    """Whether a task is answered greedily, whatever the temperature."""
    do_sample = {**(task.get_config("generation_kwargs") or {}), **generation}.get("do_sample")
    return do_sample is not None and not do_sample


def _names(tasks: Iterable[str]) -> str:
    names = list(tasks)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
