"""How published cells were measured, as far as it is known, in the terms of lm-evaluation-harness.

Sources: the authors' `reproduce.py`, `run_eval.py` and `vllm_loop/veval.py`; the plan of the independent reproduction
for MMLU-Pro. `items` are the sizes of the data sets.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Evaluation:
    """The tasks of lm-evaluation-harness that measure a cell, and how it asks them.

    Attributes:
        tasks: names of tasks or groups.
        items: number of items in all of them.
        num_fewshot: examples in each prompt.
        chat_template: whether prompts are in the model's chat format; None if that was not published.
        metric: such as "exact_match,custom-extract"; None if none was named: each task's first.
        generation: settings of generation on top of each task's own.
        max_tokens: the most tokens that an answer may have; 0 for log-likelihoods.
    """

    tasks: tuple[str, ...]
    items: int
    num_fewshot: int
    chat_template: bool | None = None
    metric: str | None = None
    generation: dict = field(default_factory=dict)
    max_tokens: int = 0


@dataclass(frozen=True)
class Protocol:
    """What is known of how a cell was measured.

    Attributes:
        text: in one line; with what is not known.
        evaluation: the same for lm-evaluation-harness; None if it has no such task, or too little is known.
    """

    text: str
    evaluation: Evaluation | None = None


SIXTEEN_TASKS = Protocol(
    "bfloat16, no examples, no chat format; which metric of each task counts was not published, and all have acc",
    Evaluation(
        (
            "arc_easy",
            "arc_challenge",
            "hellaswag",
            "piqa",
            "winogrande",
            "lambada_openai",
            "sciq",
            "openbookqa",
            "commonsense_qa",
            "truthfulqa_mc1",
            "mmlu_elementary_mathematics",
            "mmlu_high_school_mathematics",
            "mmlu_high_school_physics",
            "mmlu_college_mathematics",
            "mmlu_formal_logic",
            "mmlu_abstract_algebra",
        ),
        items=26_511,
        num_fewshot=0,
        chat_template=False,
        metric="acc",
    ),
)
MMLU_PRO = Protocol(
    "5-shot chain of thought; whether in the chat format was not published",
    Evaluation(("mmlu_pro",), items=12_032, num_fewshot=5, metric="exact_match,custom-extract", max_tokens=2048),
)
SIXTEEN_UNNAMED = Protocol("the notes do not name the tasks")
OPENBOOKQA = Protocol("number of examples, chat format and metric were not published")


def aime26(sampling: str, max_tokens: int) -> Protocol:
    """Sampled answers to the 30 problems of AIME26, of which lm-evaluation-harness 0.4.13 has no task."""
    return Protocol(
        f"data set math-ai/aime26, 16 samples of each problem and seed, {sampling}, at most {max_tokens:,} new tokens, "
        "chat format; lm-evaluation-harness 0.4.13 has no such task"
    )


AIME26_QWEN3 = aime26("temperature 0.6, top_p 0.95, top_k 20", 32_768)
AIME26_GPT_OSS = aime26("temperature 1, medium reasoning effort", 65_536)
AIME26_ERNIE = aime26("temperature 0.6, top_p 0.95", 65_536)
AIME26_KIMI = aime26("temperature 0.6", 65_536)
