"""Which metric a task is compared by, and what counts as an answer."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from loopexport import EvaluationError
from loopexport.evaluation.effects import TOKEN_LIMITS, check_effects, with_token_limit
from loopexport.evaluation.scoring import Metric, answer_of, choose_metric, pair_up, score
from loopexport.evaluation.tasks import Prompting

pytest.importorskip("lm_eval")


def a_task(*metrics, higher=True, generation=None):
    config = SimpleNamespace(task="mine", metric_list=[{"metric": name} for name in metrics])
    return SimpleNamespace(
        config=config,
        higher_is_better=lambda: dict.fromkeys(metrics, higher),
        get_config=lambda name: generation,
        doc_to_choice=lambda doc: doc["choices"],
    )


def a_sample(item=0, **changes):
    return {
        "doc_id": item,
        "doc": {"choices": ["a long choice", "b"]},
        "filter": "none",
        "metrics": ["acc", "acc_norm"],
        "acc": 1.0,
        "acc_norm": 0.0,
        "doc_hash": "d",
        "prompt_hash": f"p{item}",
        "target": 1,
        "arguments": [("prompt", " a long choice"), ("prompt", " b")],
        "filtered_resps": [(-4.0, False), (-3.0, True)],
        "resps": [],
        **changes,
    }


def test_the_first_metric_of_the_task_is_compared():
    assert choose_metric(a_task("acc_norm", "acc"), [a_sample()], None) == Metric("acc_norm", "none")
    assert choose_metric(a_task("acc_norm", "acc"), [a_sample()], "acc") == Metric("acc", "none")


def test_a_metric_may_name_its_filter():
    samples = [a_sample(), a_sample(filter="strict")]
    assert choose_metric(a_task("acc"), samples, "acc,strict") == Metric("acc", "strict")
    assert str(Metric("acc", "strict")) == "acc,strict"
    with pytest.raises(EvaluationError, match="it has acc, acc_norm with filter none or strict"):
        choose_metric(a_task("acc"), samples, "acc,loose")
    with pytest.raises(EvaluationError, match="no metric 'bleu'"):
        choose_metric(a_task("acc"), samples, "bleu")


def test_loss_is_no_verdict():
    with pytest.raises(EvaluationError, match="less is better"):
        choose_metric(a_task("word_perplexity", higher=False), [a_sample(word_perplexity=3.0)], None)


def test_nan_is_no_answer():
    """The harness takes the first choice where all are NaN, so that a broken model would get points for it."""
    nan = float("nan")
    broken = a_sample(acc=1.0, filtered_resps=[(nan, False), (nan, False)])
    answer = answer_of(a_task("acc"), broken, Metric("acc", "none"), len)
    assert (answer.score, answer.is_nan) == (0.0, True)
    assert "NaN" in answer.text
    assert not answer_of(a_task("acc"), a_sample(), Metric("acc", "none"), len).is_nan


def test_the_chosen_choice_is_the_metrics():
    assert answer_of(a_task("acc"), a_sample(), Metric("acc", "none"), len).text == "b"
    assert answer_of(a_task("acc"), a_sample(), Metric("acc_norm", "none"), len).text == "a long choice"


@pytest.mark.parametrize(("metric", "choice"), [("acc", "a"), ("acc_norm", "abcd"), ("acc_bytes", "abcd")])
def test_lengths_are_those_of_the_choices_without_the_delimiter(metric, choice):
    """As in lm-evaluation-harness: -1.0 / 1 is less than -3.2 / 4, but -1.0 / 2 is more than -3.2 / 5."""
    sample = a_sample(
        doc={"choices": ["a", "abcd"]},
        arguments=[("prompt", " a"), ("prompt", " abcd")],
        filtered_resps=[(-1.0, False), (-3.2, False)],
        acc_bytes=1.0,
    )
    assert answer_of(a_task(metric), sample, Metric(metric, "none"), len).text == choice


class Fake:
    """Stands for a `Panel`."""

    def speaking(self, arm):
        return nullcontext()


def score_with(error, monkeypatch):
    def fail(**_):
        raise error

    monkeypatch.setattr("lm_eval.evaluator.evaluate", fail)
    return score(Fake(), None, {"tasks": {}}, Prompting())


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), AttributeError("no attribute 'tolist'")])
def test_whatever_a_task_raises_is_one_line(error, monkeypatch):
    with pytest.raises(EvaluationError, match=rf"as they are configured \({type(error).__name__}: {error}"):
        score_with(error, monkeypatch)


@pytest.mark.parametrize("error", [EvaluationError("base cannot answer"), RuntimeError("CUDA out of memory")])
def test_errors_that_are_explained_already_and_lack_of_memory_stay(error, monkeypatch):
    with pytest.raises(type(error)) as raised:
        score_with(error, monkeypatch)
    assert raised.value is error


@pytest.mark.parametrize("value", [float("nan"), (1, 2), "yes"])
def test_refuses_metrics_without_a_score_for_each_item(value):
    with pytest.raises(EvaluationError, match="no score for a single item"):
        answer_of(a_task("f1"), a_sample(f1=value), Metric("f1", "none"), len)


def test_generated_text_is_truncated_at_its_limit():
    task = a_task("acc", generation={"max_gen_toks": 4})
    texts = {text: a_sample(arguments=[("prompt", {"until": []})], resps=[[text]]) for text in ("abc", "abcd")}
    answers = {text: answer_of(task, sample, Metric("acc", "none"), len) for text, sample in texts.items()}
    assert [(text, each.text, each.tokens, each.truncated) for text, each in answers.items()] == [
        ("abc", "abc", 3, False),
        ("abcd", "abcd", 4, True),
    ]


def test_refuses_to_pair_different_prompts():
    base, loop = [a_sample(0), a_sample(1)], [a_sample(0), a_sample(1, prompt_hash="other")]
    with pytest.raises(EvaluationError, match="different items"):
        pair_up(a_task("acc"), Metric("acc", "none"), base, loop, seed=1, count_tokens=len)
    [first, second] = pair_up(a_task("acc"), Metric("acc", "none"), base, base[::-1], seed=1, count_tokens=len)
    assert (first.item, first.target, second.difference) == (0, "b", 0)


def asked_of(output_type="generate_until", num_fewshot=None, **own):
    config = {"output_type": output_type, "num_fewshot": num_fewshot, "generation_kwargs": own}
    return SimpleNamespace(get_config=config.get)


@pytest.mark.parametrize(
    ("task", "prompting", "message"),
    [
        (asked_of(num_fewshot=0), Prompting(num_fewshot=5), "num_fewshot 5 has no effect on one: num_fewshot 0"),
        (asked_of("multiple_choice"), Prompting(generation={"top_k": 5}), "no model generates text for one"),
        (asked_of(do_sample=False), Prompting(generation={"temperature": 0.7}), "do_sample=true,temperature=0.7"),
        (asked_of(), Prompting(generation={"temperature": 0.7, "do_sample": False}), "temperature 0.7 has no effect"),
    ],
)
def test_an_option_without_effect_is_refused(task, prompting, message):
    with pytest.raises(EvaluationError, match=message):
        check_effects({"one": task}, prompting)


@pytest.mark.parametrize(
    ("task", "prompting"),
    [
        (asked_of(num_fewshot=0), Prompting(num_fewshot=0)),
        (asked_of(num_fewshot=3), Prompting(num_fewshot=5)),
        (asked_of(), Prompting(generation={"temperature": 0.7})),  # samples where do_sample is not set
        (asked_of(do_sample=False), Prompting(generation={"temperature": 0.7, "do_sample": True})),
        (asked_of(do_sample=False, temperature=0.7), Prompting(generation={"max_gen_toks": 5})),  # the task's own
        (asked_of(do_sample=False), Prompting(generation={"temperature": 0.0})),
    ],
)
def test_an_option_with_an_effect_is_not_refused(task, prompting):
    check_effects({"one": task, "other": asked_of("multiple_choice")}, prompting)


@pytest.mark.parametrize("name", TOKEN_LIMITS)
def test_limit_of_tokens_has_one_name(name):
    assert with_token_limit({"do_sample": False, name: 1}) == {"do_sample": False, "max_gen_toks": 1}
    task = a_task("acc", generation={name: 4})
    sample = a_sample(arguments=[("prompt", {"until": []})], resps=[["abcd"]])
    assert answer_of(task, sample, Metric("acc", "none"), len).truncated


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"max_tokens": 1, "max_gen_toks": 2}, "max_gen_toks and max_tokens, which mean the same"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number"),
        ({"max_tokens": None}, "max_tokens=None must be a whole number"),
    ],
)
def test_wrong_limit_of_tokens_is_refused(generation, message):
    with pytest.raises(EvaluationError, match=message):
        with_token_limit(generation)
