"""Score the arms' answers with lm-evaluation-harness, and pair those of a loop with those of the base."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from loopexport.errors import EvaluationError, LoopExportError, one_line

from .arms import Arm, is_out_of_memory
from .effects import TOKEN_LIMITS
from .items import Answer, Pair
from .nan_text import LOST
from .panel import Panel
from .tasks import Prompting

NO_ANSWER = "(no answer: NaN)"
_LENGTHS: dict[str, Callable[[str], int]] = {"acc_norm": len, "acc_bytes": lambda choice: len(choice.encode())}

# What Python raises in the code of a task, or in transformers for a setting of generation. Other errors pass, such as
# one that a caller's `progress` raises to stop a run.
_RAISED_BY_TASKS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError),
    *(RuntimeError, SyntaxError, TypeError, ValueError, re.error),
)

# The harness checks the lengths of prompts and choices by `assert` without a message.
_WITHOUT_WORDS = "perhaps a prompt or a choice is empty, or a choice is longer than the model's context"


def score(
    panel: Panel,
    arm: Arm,
    tasks: dict,
    prompting: Prompting,
    items: dict[str, list[int]] | None = None,
) -> dict[str, list[dict]]:
    """The items of each task as one arm answered them, as lm-evaluation-harness logs them.

    Args:
        panel: gives the answers.
        arm: whose.
        tasks: as `TaskSource.load` gives them.
        prompting: how to ask.
        items: for each task, the numbers of its items to use; None for all.

    Returns:
        Empty in every process but the first.

    Raises:
        EvaluationError: a task cannot be asked, or scored, as configured.
    """
    from lm_eval.evaluator import evaluate

    for task in tasks["tasks"].values():
        _configure(task, prompting)
    try:
        with panel.speaking(arm):
            results = evaluate(
                lm=panel,
                task_dict=tasks,
                limit=prompting.limit if items is None else None,
                samples=items,
                bootstrap_iters=0,
                apply_chat_template=prompting.chat_template,
                fewshot_as_multiturn=prompting.chat_template,
                confirm_run_unsafe_code=prompting.allow_code,
            )
    except LoopExportError:
        raise
    except _RAISED_BY_TASKS as error:
        if is_out_of_memory(error):
            raise
        text = f"{type(error).__name__}: {one_line(error, 300) or _WITHOUT_WORDS}"
        raise EvaluationError(f"the tasks cannot be run as they are configured ({text})") from error
    return {} if results is None else {name: results["samples"][name] for name in tasks["tasks"]}


def _configure(task, prompting: Prompting) -> None:
    """Set what the user asked for, as lm-evaluation-harness's own command does."""
    own = task.get_config("num_fewshot")
    if prompting.num_fewshot is not None and own != 0:  # 0 in a task means that it cannot have examples
        task.set_config(key="num_fewshot", value=prompting.num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    if prompting.generation and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value=prompting.generation, update=True)
    task.set_fewshot_seed(seed=prompting.fewshot_seed)


@dataclass(frozen=True)
class Metric:
    """What a task is compared by.

    Attributes:
        name: of the metric.
        filter: of the filter that extracts answers.
    """

    name: str
    filter: str

    def __str__(self) -> str:
        return self.name if self.filter == "none" else f"{self.name},{self.filter}"


def choose_metric(task, samples: list[dict], wanted: str | None) -> Metric:
    """The metric of a task: the wanted one, or the first that the task lists. It is chosen before any score is seen.

    Args:
        task: the task.
        samples: its items as lm-evaluation-harness logs them.
        wanted: a metric, or a metric and a filter with a comma between them.

    Raises:
        EvaluationError: there is no such metric, or a smaller value of it is better.
    """
    name, _, chosen_filter = (wanted or "").partition(",")
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    known = [each["metric"] for each in task.config.metric_list or () if isinstance(each.get("metric"), str)]
    metrics = [each for each in [*known, *samples[0]["metrics"]] if each in samples[0]]
    chosen = name or next(iter(metrics), None)
    if chosen not in metrics or (chosen_filter or filters[0]) not in filters:
        raise EvaluationError(
            f"{task.config.task} has no metric {wanted!r}; it has {', '.join(dict.fromkeys(metrics)) or 'none'} with "
            f"filter {' or '.join(filters)}"
        )
    if not task.higher_is_better().get(chosen, True):
        raise EvaluationError(
            f"{task.config.task} is measured by {chosen}, where less is better: loss and perplexity do not tell "
            "whether a loop helps; choose a task with right and wrong answers, or another --metric"
        )
    return Metric(str(chosen), chosen_filter or filters[0])


def pair_up(
    task,
    metric: Metric,
    base: list[dict],
    loop: list[dict],
    *,
    seed: int,
    count_tokens: Callable[[str], int],
) -> list[Pair]:
    """The pairs of one task.

    Args:
        task: the task.
        metric: the metric to compare by.
        base, loop: its items, as lm-evaluation-harness logs them.
        seed: of sampled generation.
        count_tokens: the number of tokens of a text.

    Raises:
        EvaluationError: the two did not get the same items, or the metric has no score for a single item.
    """
    theirs, ours = _by_item(base, metric), _by_item(loop, metric)
    if {key: sample["prompt_hash"] for key, sample in theirs.items()} != {
        key: sample["prompt_hash"] for key, sample in ours.items()
    }:
        raise EvaluationError(f"base and loop got different items of {task.config.task}; choose another --out")
    return [
        Pair(
            task=task.config.task,
            metric=str(metric),
            item=item,
            seed=seed,
            item_hash=sample["doc_hash"],
            prompt_hash=sample["prompt_hash"],
            prompt=str(sample["arguments"][0][0]),
            target=_target(sample),
            base=answer_of(task, sample, metric, count_tokens),
            loop=answer_of(task, ours[item], metric, count_tokens),
        )
        for item, sample in theirs.items()
    ]


def of_metric(samples: Iterable[dict], metric: Metric) -> list[dict]:
    """The items with the metric's filter, in their order."""
    return sorted((each for each in samples if each["filter"] == metric.filter), key=lambda each: each["doc_id"])


def _by_item(samples: Iterable[dict], metric: Metric) -> dict[int, dict]:
    return {sample["doc_id"]: sample for sample in of_metric(samples, metric)}


def _target(sample: dict) -> str:
    target, choices = sample["target"], _choices(sample)
    is_index = isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(choices)
    return choices[target].strip() if is_index and len(choices) > 1 else str(target)


def _choices(sample: dict) -> list[str]:
    """The choices of an item that is scored by log-likelihood; empty for generated text."""
    return [arguments[1] for arguments in sample["arguments"] if len(arguments) > 1 and isinstance(arguments[1], str)]


def answer_of(task, sample: dict, metric: Metric, count_tokens: Callable[[str], int]) -> Answer:
    """What one arm answered to one item.

    Raises:
        EvaluationError: the metric has no score for a single item.
    """
    choices = _choices(sample)
    loglikelihoods = tuple(float(each[0]) for each in sample["filtered_resps"][: len(choices)])
    if any(map(math.isnan, loglikelihoods)):  # a metric would take the first choice for the answer
        return Answer(0.0, NO_ANSWER, loglikelihoods)
    texts = [] if choices else [*_texts(sample["resps"])]
    if any(LOST in text for text in texts):
        return Answer(0.0, NO_ANSWER, lost=True)
    value = _score(sample, metric, task.config.task)
    if choices:
        return Answer(value, _chosen(task, sample, loglikelihoods, metric), loglikelihoods)
    text = next(iter(texts), "")
    tokens = count_tokens(text)
    return Answer(value, text, (), tokens, tokens >= _token_limit(task))


def _score(sample: dict, metric: Metric, task: str) -> float:
    value: Any = sample[metric.name]
    if not isinstance(value, (bool, int, float)) or not math.isfinite(value):
        raise EvaluationError(
            f"metric {metric} of {task} has no score for a single item; choose a metric that has, as most have "
            "(acc, acc_norm, exact_match), with --metric"
        )
    return float(value)


def _chosen(task, sample: dict, loglikelihoods: tuple[float, ...], metric: Metric) -> str:
    """The choice that the metric takes for the answer; acc_norm and acc_bytes divide by the length of the choice."""
    choices, length = _choices(sample), _LENGTHS.get(metric.name)
    if length is None:
        values = list(loglikelihoods)
    else:  # of the choice alone: a delimiter stands before it in the request
        own = task.doc_to_choice(sample["doc"]) if hasattr(task, "doc_to_choice") else choices
        values = [value / length(choice) for value, choice in zip(loglikelihoods, own, strict=False)]
    return choices[max(range(len(values)), key=values.__getitem__)].strip()


def _texts(responses) -> Iterator[str]:
    """All generated texts of an item, which may be asked several times."""
    if isinstance(responses, str):
        yield responses
    elif isinstance(responses, (list, tuple)):
        for each in responses:
            yield from _texts(each)


def _token_limit(task) -> float:
    """How many tokens a task lets a model generate; without a number of its own, lm-evaluation-harness takes 256."""
    settings = task.get_config("generation_kwargs") or {}
    limit = next((settings[name] for name in TOKEN_LIMITS if settings.get(name) is not None), 256)
    return limit if isinstance(limit, int) and limit > 0 else math.inf
