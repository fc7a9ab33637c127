"""Results of `loopexport compare --save`, made up."""

from __future__ import annotations

from loopexport.export.results_file import Measured, parse_result

TASK = {
    "name": "arc_easy",
    "version": 1.0,
    "metric": "acc",
    "is_group": False,
    "n": 100,
    "base": 0.41,
    "loop": 0.43,
    "difference": 0.02,
    "low": -0.02,
    "high": 0.06,
    "confidence": 0.95,
    "method": "tango",
    "gained": 5,
    "lost": 3,
    "p": 0.49,
    "p_holm": None,
    "verdict": "inconclusive",
    "smallest_difference": 0.05,
    "items_needed": 1570,
}
LOSS = {
    **TASK,
    "name": "openbookqa",
    "n": 500,
    "base": 0.40,
    "loop": 0.35,
    "difference": -0.05,
    "low": -0.08,
    "high": -0.02,
    "verdict": "worse",
}
GAIN = {
    **LOSS,
    "name": "piqa",
    "base": 0.35,
    "loop": 0.40,
    "difference": 0.05,
    "low": 0.02,
    "high": 0.08,
    "verdict": "better",
}
GROUP = {
    **TASK,
    "name": "both",
    "version": None,
    "is_group": True,
    "n": 600,
    "loop": 0.39,
    "difference": -0.02,
    "low": -0.04,
    "high": 0.001,
    "items_needed": 1_800,
}
HOSTILE = {**TASK, "name": "a | [b](http://evil.example) ![](x)", "metric": "<img src=x>", "low": None, "high": None}


def made_measured(own=(), other=()):
    """Results of an export, made of entries of `loop_results.json`."""
    return Measured(tuple(map(parse_result, own)), tuple(map(parse_result, other)))


def made_result(loop, *tasks, **changes):
    """One entry of `loop_results.json`: of a loop, with these tasks and values."""
    return {
        "date": "2026-11-28",
        "loopexport": "0.6.0",
        "spec": loop.to_config_fields(),
        "weights": None,
        "backend": "hf",
        "dtype": "bfloat16",
        "device": "cpu",
        "versions": {"lm_eval": "0.4.13", "torch": "2.13.0", "transformers": "5.24.0"},
        "seeds": [1234],
        "settings": {"num_fewshot": None, "limit": 100, "chat_template": False, "batch_size": "8"},
        "tasks": list(tasks or [TASK]),
        **changes,
    }
