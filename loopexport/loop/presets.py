"""The published cells: which loop was measured on which model, by whom, and what came out, losses included.

A preset is for the architecture and the depth that it was measured on, and scales to no other.

Sources: `PAPER` is arXiv 2605.23872; `AUTHORS` the README of its authors' code
(github.com/L-z-Chen/Training-Free-Looped-Transformer); `REPRODUCTION` an independent one
(github.com/singularity119/Training-Free-Looped-Transformers-Reproduction).
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from loopexport.base.checkpoint import Checkpoint
from loopexport.errors import SpecError

from .spec import LoopSpec

PAPER = "arXiv 2605.23872"
AUTHORS = "the authors' code"
REPRODUCTION = "an independent reproduction"

STATUSES = {
    "reported": "by the authors alone",
    "replicated": "others measured a gain too",
    "not replicated": "the gain shrank into noise when it was measured again",
    "negative": "the loop lost, within the noise or beyond it",
}

# The authors' recipes for log-likelihood tasks and for generation with sparse experts.
_ANCHORED = {"steps": 6, "anchor": 0.5, "kv": "reference", "decode": "bypass"}
_FROZEN = {
    "steps": 6,
    "anchor": 0.5,
    "mode": "layer",
    "kv": "reference",
    "frozen_routing": True,
    "norm_interpolation": True,
}


@dataclass(frozen=True)
class Result:
    """One measured difference between the looped model and its base.

    Attributes:
        task: what was measured.
        gain: in percentage points, looped minus base; None where only the recipe was published.
        source: who says so.
        interval: 95 % confidence interval of the gain, paired, in points; None where none was published.
        note: what else has to be known.
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
        name: what `--preset` takes.
        models: names of the models that it was measured on, without their organisations.
        model_type, num_layers: their family and depth.
        fields: what goes into `LoopSpec`; None where the cell itself was not published.
        status: one of `STATUSES`.
        results: what was measured.
    """

    name: str
    models: tuple[str, ...]
    model_type: str
    num_layers: int
    fields: dict | None
    status: str
    results: tuple[Result, ...]

    @property
    def spec(self) -> LoopSpec | None:
        """The loop, or None where it was not published."""
        return None if self.fields is None else LoopSpec(**self.fields)

    def to_dict(self) -> dict:
        """All of it for `--json`."""
        return {
            "name": self.name,
            "status": self.status,
            "models": list(self.models),
            "model_type": self.model_type,
            "num_layers": self.num_layers,
            "spec": None if self.spec is None else self.spec.to_config_fields(),
            "results": [vars(result) for result in self.results],
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
    ),
    Preset(
        "qwen3-4b-base-16-tasks",
        ("Qwen3-4B-Base",),
        "qwen3",
        36,
        {"span": (15, 19), **_ANCHORED},
        "reported",
        (Result("16 log-likelihood tasks", None, AUTHORS, note="their recipe, without its result"),),
    ),
    Preset(
        "qwen3-30b-a3b-16-tasks",
        ("Qwen3-30B-A3B", "Qwen3-30B-A3B-Instruct-2507"),
        "qwen3_moe",
        48,
        {"span": (22, 26), **_ANCHORED},
        "reported",
        (
            Result("16 log-likelihood tasks", None, AUTHORS, note="their recipe, without its result"),
            Result("CommonsenseQA, Qwen3-30B-A3B-Instruct", 1.14, PAPER),
        ),
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
    ),
    Preset(
        "qwen3-30b-a3b-aime26-t2",
        ("Qwen3-30B-A3B",),
        "qwen3_moe",
        48,
        {"span": (29, 34), **_FROZEN, "damping": 1 / 3},
        "reported",
        (Result("AIME26, five seeds, integration time 2", 2.79, AUTHORS, (0.03, 5.55)),),
    ),
    Preset(
        "moonlight-16b-a3b-openbookqa",
        ("Moonlight-16B-A3B-Instruct",),
        "deepseek_v3",
        27,
        None,
        "reported",
        (Result("OpenBookQA", 1.20, PAPER, note="span and steps were not published with it"),),
    ),
    Preset(
        "gpt-oss-20b-aime26",
        ("gpt-oss-20b",),
        "gpt_oss",
        24,
        {"span": (14, 16), **_FROZEN},
        "negative",
        (Result("AIME26, two seeds", -1.15, AUTHORS, (-3.56, 1.27), "no other span rose above the noise"),),
    ),
    Preset(
        "ernie-4.5-21b-a3b-aime26",
        ("ERNIE-4.5-21B-A3B-Thinking",),
        "ernie4_5_moe",
        28,
        {"span": (17, 19), **_FROZEN},
        "negative",
        (Result("AIME26, two seeds", -2.29, AUTHORS, (-5.80, 1.22), "12 of 13 spans lost"),),
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
                "its language model is of the deepseek_v3 kind; examples/language_model.py takes it out",
            ),
        ),
    ),
)


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        SpecError: there is none.
    """
    if not isinstance(name, str):
        raise SpecError(f"preset {name!r} is not a name; `loopexport presets list` has them")
    for preset in PRESETS:
        if preset.name == name:
            return preset
    names = [preset.name for preset in PRESETS]
    near = get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    raise SpecError(f"no preset {name!r}; {hint}")


def preset_fields(name: str) -> dict:
    """What a preset puts into `LoopSpec`.

    Raises:
        SpecError: there is no such preset, or its cell was not published.
    """
    preset = find_preset(name)
    if preset.fields is None:
        raise SpecError(
            f"preset {name} has no cell: {preset.results[0].note}; leave --preset out, and give --span and --steps"
        )
    return dict(preset.fields)


def published_cell(base: Checkpoint, spec: LoopSpec) -> Preset | None:
    """The preset that was measured with this very loop on this very model, if one was."""
    name = base.origin.name.rsplit("/", 1)[-1].lower()
    for preset in PRESETS:
        if preset.spec == spec and not misfit(preset, base) and name in map(str.lower, preset.models):
            return preset
    return None


def misfit(preset: Preset, base: Checkpoint) -> str:
    """How a base differs in kind from what a preset was measured on; empty where it does not."""
    if (base.model_type, base.num_layers) == (preset.model_type, preset.num_layers):
        return ""
    return (
        f"preset {preset.name} was measured on {preset.model_type} with {preset.num_layers} layers, "
        f"and this is {base.model_type} with {base.num_layers}"
    )
