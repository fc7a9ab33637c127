"""Presets: published cells, each a loop on a model, with who measured it and the results, losses included.

A preset applies to the architecture and depth that it was measured on; its span is never scaled to another depth.

Sources: `PAPER` is arXiv 2605.23872; `AUTHORS` is the README of the authors' code
(github.com/L-z-Chen/Training-Free-Looped-Transformer); `REPRODUCTION` is an independent reproduction
(github.com/singularity119/Training-Free-Looped-Transformers-Reproduction); `NOTES` are reading notes on the paper by
third parties.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from loopexport.base.checkpoint import Checkpoint
from loopexport.errors import SpecError, nearest

from .cost import layer_evaluations
from .protocols import (
    AIME26_ERNIE,
    AIME26_GPT_OSS,
    AIME26_KIMI,
    AIME26_QWEN3,
    MMLU_PRO,
    OPENBOOKQA,
    SIXTEEN_TASKS,
    SIXTEEN_UNNAMED,
    Evaluation,
    Protocol,
)
from .spec import LoopSpec

PAPER = "arXiv 2605.23872"
AUTHORS = "the authors' code"
REPRODUCTION = "an independent reproduction"
NOTES = "notes of third parties on the paper"

STATUSES = {
    "reported": "by the authors only",
    "replicated": "others measured a gain too",
    "not replicated": "measured again, the gain was within the noise",
    "negative": "the loop lost, within the noise or beyond it",
    "third-party": "from notes of third parties, not compared with the source: no card repeats it",
}

# Fields that the authors' recipes share: log-likelihood tasks, and generation with sparse experts.
_ANCHORED = {"steps": 6, "anchor": 0.5, "kv": "reference", "decode": "bypass"}
_FROZEN = {
    "steps": 6,
    "anchor": 0.5,
    "mode": "layer",
    "kv": "reference",
    "frozen_routing": True,
    "norm_interpolation": True,
}


# transformers has no native family of Kimi-VL, and an export runs no other code.
_KIMI_VL = "its language model is a deepseek_v3; convert it with --text-only"


@dataclass(frozen=True)
class Result:
    """One measured difference between the looped model and its base.

    Attributes:
        task: the benchmark.
        gain: looped minus base, in percentage points; None if only the recipe was published.
        source: who published it.
        interval: paired 95 % confidence interval of the gain, in percentage points; None if none was published.
        note: anything else that a reader needs to know.
    """

    task: str
    gain: float | None
    source: str
    interval: tuple[float, float] | None = None
    note: str = ""

    def __str__(self) -> str:
        gain = "no number" if self.gain is None else f"{self.gain:+.2f} points"
        interval = f", 95 % CI [{self.interval[0]:+.2f}, {self.interval[1]:+.2f}]" if self.interval else ""
        return f"{self.task}: {gain}{interval} ({self.source}{'; ' if self.note else ''}{self.note})"


@dataclass(frozen=True)
class Preset:
    """A published cell.

    Attributes:
        name: its name for `--preset`.
        models: names of the models that it was measured on, without their organisations.
        model_type: the family of these models.
        num_layers: their number of decoder layers.
        fields: the fields of its `LoopSpec`; None if the loop was not published.
        status: one of `STATUSES`.
        results: the measured differences.
        protocol: how they were measured.
    """

    name: str
    models: tuple[str, ...]
    model_type: str
    num_layers: int
    fields: dict | None
    status: str
    results: tuple[Result, ...]
    protocol: Protocol

    @property
    def evaluation(self) -> Evaluation | None:
        """How `loopexport compare --preset` measures the cell; None if lm-evaluation-harness cannot."""
        return self.protocol.evaluation

    @property
    def cost_factor(self) -> float | None:
        """Layer evaluations per token as a multiple of the base's; None if the loop was not published."""
        return None if self.spec is None else layer_evaluations(self.num_layers, self.spec) / self.num_layers

    @property
    def spec(self) -> LoopSpec | None:
        """The loop; None if it was not published."""
        return None if self.fields is None else LoopSpec(**self.fields)

    def to_dict(self) -> dict:
        """The preset for `--json`."""
        return {
            "name": self.name,
            "status": self.status,
            "models": list(self.models),
            "model_type": self.model_type,
            "num_layers": self.num_layers,
            "spec": None if self.spec is None else self.spec.to_config_fields(),
            "results": [vars(result) for result in self.results],
            "protocol": self.protocol.text,
            "evaluation": None if self.evaluation is None else asdict(self.evaluation),
        }


PRESETS = (
    Preset(
        "qwen3-4b-mmlu-pro",
        ("Qwen3-4B-Instruct", "Qwen3-4B-Instruct-2507"),
        "qwen3",
        36,
        {"span": (15, 19), "steps": 3, "kv": "reference"},
        "replicated",
        (
            Result("MMLU-Pro, 5-shot CoT, Qwen3-4B-Instruct", 2.64, PAPER, note="57.14 to 59.79"),
            Result("MMLU-Pro, Qwen3-4B-Instruct-2507", 1.05, REPRODUCTION, note="six other spans lost"),
        ),
        MMLU_PRO,
    ),
    Preset(
        "qwen3-4b-base-16-tasks",
        ("Qwen3-4B-Base",),
        "qwen3",
        36,
        {"span": (15, 19), **_ANCHORED},
        "reported",
        (Result("16 log-likelihood tasks", None, AUTHORS, note="the recipe only, without a result"),),
        SIXTEEN_TASKS,
    ),
    Preset(
        "qwen3-30b-a3b-16-tasks",
        ("Qwen3-30B-A3B",),
        "qwen3_moe",
        48,
        {"span": (22, 26), **_ANCHORED},
        "reported",
        (Result("16 log-likelihood tasks", None, AUTHORS, note="the recipe only, without a result"),),
        SIXTEEN_TASKS,
    ),
    Preset(
        "qwen3-30b-a3b-aime26",
        ("Qwen3-30B-A3B",),
        "qwen3_moe",
        48,
        {"span": (29, 33), **_FROZEN},
        "not replicated",
        (
            Result("AIME26, six seeds", 1.42, AUTHORS, (-0.87, 3.72), "+2.44 over the first four seeds"),
            Result("LiveCodeBench v5/v6", 0.35, AUTHORS, (-0.51, 1.21)),
            Result("Omni-MATH, 1028 problems", 0.22, AUTHORS, (-0.81, 1.24)),
        ),
        AIME26_QWEN3,
    ),
    Preset(
        "qwen3-30b-a3b-aime26-t2",
        ("Qwen3-30B-A3B",),
        "qwen3_moe",
        48,
        {"span": (29, 34), **_FROZEN, "damping": 1 / 3},
        "reported",
        (Result("AIME26, five seeds, integration time 2", 2.79, AUTHORS, (0.03, 5.55)),),
        AIME26_QWEN3,
    ),
    Preset(
        "qwen3-30b-a3b-aime26-t2-no-norm",
        ("Qwen3-30B-A3B",),
        "qwen3_moe",
        48,
        {"span": (29, 34), **_FROZEN, "damping": 1 / 3, "norm_interpolation": False},
        "reported",
        (Result("AIME26, time 2, no norm interpolation", 2.81, AUTHORS),),
        AIME26_QWEN3,
    ),
    Preset(
        "qwen3-30b-a3b-aime26-t2-narrow",
        ("Qwen3-30B-A3B",),
        "qwen3_moe",
        48,
        {"span": (29, 33), **_FROZEN, "damping": 1 / 3},
        "reported",
        (Result("AIME26, three seeds, time 2, 29:33", 2.43, AUTHORS, (-1.49, 6.35)),),
        AIME26_QWEN3,
    ),
    Preset(
        "qwen3-30b-a3b-aime26-t2.5",
        ("Qwen3-30B-A3B",),
        "qwen3_moe",
        48,
        {"span": (29, 34), **_FROZEN, "damping": 2.5 / 6},
        "reported",
        (Result("AIME26, five seeds, integration time 2.5", 2.79, AUTHORS, (-0.69, 6.27)),),
        AIME26_QWEN3,
    ),
    Preset(
        "qwen3-30b-a3b-aime26-t4",
        ("Qwen3-30B-A3B",),
        "qwen3_moe",
        48,
        {"span": (29, 33), **_FROZEN, "steps": 12, "damping": 1 / 3},
        "negative",
        (Result("AIME26, one seed, K 12, integration time 4", -7.9, AUTHORS, note="70.2 to 62.3"),),
        AIME26_QWEN3,
    ),
    Preset(
        "qwen3-1.7b-base-16-tasks",
        ("Qwen3-1.7B-Base",),
        "qwen3",
        28,
        {"span": (12, 16), "steps": 2, "kv": "reference"},
        "third-party",
        (
            Result("16 log-likelihood tasks", 0.55, NOTES, note="anchor, K/V policy and decode mode were not given"),
            Result("16 log-likelihood tasks, other spans", None, NOTES, note="6 layers -0.82, 12 -0.63, all 28 -27.73"),
        ),
        SIXTEEN_UNNAMED,
    ),
    Preset(
        "moonlight-16b-a3b-openbookqa",
        ("Moonlight-16B-A3B-Instruct",),
        "deepseek_v3",
        27,
        None,
        "reported",
        (Result("OpenBookQA", 1.20, PAPER, note="its span and steps were not published"),),
        OPENBOOKQA,
    ),
    Preset(
        "gpt-oss-20b-aime26",
        ("gpt-oss-20b",),
        "gpt_oss",
        24,
        {"span": (14, 16), **_FROZEN},
        "negative",
        (Result("AIME26, two seeds", -1.15, AUTHORS, (-3.56, 1.27), "no other span gained beyond the noise"),),
        AIME26_GPT_OSS,
    ),
    Preset(
        "ernie-4.5-21b-a3b-aime26",
        ("ERNIE-4.5-21B-A3B-Thinking",),
        "ernie4_5_moe",
        28,
        {"span": (17, 19), **_FROZEN},
        "negative",
        (Result("AIME26, two seeds", -2.29, AUTHORS, (-5.80, 1.22), "12 of 13 spans lost"),),
        AIME26_ERNIE,
    ),
    Preset(
        "kimi-vl-a3b-aime26",
        ("Kimi-VL-A3B-Thinking-2506",),
        "deepseek_v3",
        27,
        {"span": (16, 18), **_FROZEN},
        "negative",
        (
            Result(
                "AIME26, two seeds",
                -0.52,
                AUTHORS,
                (-3.13, 2.09),
                _KIMI_VL,
            ),
        ),
        AIME26_KIMI,
    ),
    Preset(
        "kimi-vl-a3b-truncation",
        ("Kimi-VL-A3B-Thinking-2506",),
        "deepseek_v3",
        27,
        {"span": (8, 10), **_FROZEN},
        "reported",
        (
            Result(
                "truncated answers", None, AUTHORS, note=f"13.5 to 5.7 %, p 0.0004, at the same accuracy; {_KIMI_VL}"
            ),
        ),
        AIME26_KIMI,
    ),
)


def find_preset(name: str) -> Preset:
    """The preset with a name.

    Raises:
        SpecError: there is none; the message has the nearest name or all of them.
    """
    if not isinstance(name, str):
        raise SpecError(f"preset {name!r} is not a name; see `loopexport presets list`")
    for preset in PRESETS:
        if preset.name == name:
            return preset
    names = [preset.name for preset in PRESETS]
    near = nearest(name, tuple(names)) or next((each for each in names if name and each.startswith(name)), None)
    hint = f"did you mean {near}?" if near else f"the presets are {', '.join(names)}"
    raise SpecError(f"no preset {name!r}; {hint}")


def preset_fields(name: str) -> dict:
    """The fields of `LoopSpec` that a preset sets.

    Raises:
        SpecError: there is no such preset, or its loop was not published.
    """
    preset = find_preset(name)
    if preset.fields is None:
        raise SpecError(
            f"preset {name} has no loop: {preset.results[0].note}; leave --preset out, and give --span and --steps"
        )
    return dict(preset.fields)


def published_cell(base: Checkpoint, spec: LoopSpec) -> Preset | None:
    """The preset that was measured with exactly this loop on exactly this model, and may be cited; None without one."""
    name = base.origin.name.rsplit("/", 1)[-1].lower()
    for preset in PRESETS:
        if preset.status == "third-party":
            continue
        if preset.spec == spec and not misfit(preset, base) and name in map(str.lower, preset.models):
            return preset
    return None


def misfit(preset: Preset, base: Checkpoint) -> str:
    """One line if a base has another family or depth than the models of a preset, else an empty string."""
    if (base.model_type, base.num_layers) == (preset.model_type, preset.num_layers):
        return ""
    return (
        f"preset {preset.name} was measured on {preset.model_type} with {preset.num_layers} layers, "
        f"but this base is {base.model_type} with {base.num_layers}"
    )
