"""What MLX runs: which loops, decided from the spec alone, and which configs of a base, and how mlx-lm reads those.

Every export has a copy of this file. It needs only the standard library.
"""

from __future__ import annotations

import math

from .looped_path import joined_runs
from .looped_spec import UNSTABLE_RULES, LoopSpec

MODEL_FILE = "modeling_looped_mlx.py"  # the value of `model_file` in config.json
MLX_LM = "0.32.0"  # the first release of mlx-lm that runs such a file only with trust_remote_code

FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers in `layer_types`
# Families whose `rope_parameters` have a rotary embedding for each kind of layer: mlx-lm reads them in this form, or
# under names of transformers 4, which scale it in layers of full attention alone.
NESTED_ROPE, SPLIT_ROPE = ("laguna", "mellum"), ("gemma3_text", "olmo3")
# Rotary embeddings that mlx-lm scales, by the type of scaling, and in the families that know fewer.
SCALINGS = ("linear", "dynamic", "llama3", "yarn", "deepseek_yarn", "longrope")
FEWER_SCALINGS: dict[str, tuple[str, ...]] = {
    "deepseek_v2": ("yarn", "deepseek_yarn"),
    "hunyuan_v1_dense": ("dynamic",),
    "internlm3": ("linear", "dynamic"),
    "mellum": SCALINGS[1:],
    "nemotron": ("linear",),
    "phi3": ("linear", "longrope", "su"),
    "phimoe": ("longrope", "su"),
    **dict.fromkeys((
        "cohere", "cohere2", "ernie4_5", "gemma", "gemma2", "glm4", "glm4_moe", "gpt_neox", "helium", "lfm2_moe",
        "mixtral", "phi", "qwen2_moe", "qwen3_moe", "solar_open", "stablelm", "starcoder2",
    ), ()),
}  # fmt: skip
# Families of which every n-th layer has full attention, and their names for n.
INTERVALS = {
    "cohere2": "sliding_window_pattern",
    "gemma3_text": "sliding_window_pattern",
    "qwen3_next": "full_attention_interval",
}
# Families that have in transformers no kinds of layers, while mlx-lm would read `layer_types`.
WITHOUT_KINDS = ("iquestcoder", "llama", "ministral3", "mistral")
BOTH_KINDS = ("exaone4", "gpt_oss", "olmo3")  # families that need layers of both kinds


def mlx_loop_refusal(spec: LoopSpec, num_layers: int, prefix: str = "loop_") -> str | None:
    """Why MLX does not run a loop in a model of `num_layers` layers, and what to do; None if it does.

    Args:
        spec: the loop.
        num_layers: how many layers the model has.
        prefix: what makes a setting out of the name of a field.
    """
    skipped = spec.skipped(num_layers)
    if skipped:
        return f"the path leaves out {_layers_text(skipped)}; use a path that visits every layer"
    if spec.decode != "full":
        return (
            f"decode {spec.decode} has to know which tokens are generated, and mlx-lm runs the last token of a prompt "
            f"like one of them; set {prefix}decode to full"
        )
    if spec.kv == "reference":
        rule = f", and {prefix}rule to another than {spec.rule}" if spec.rule in UNSTABLE_RULES else ""
        return (
            "kv reference depends on where the prompt ended, and mlx-lm cuts a prompt into chunks; set "
            f"{prefix}kv to shared{rule}"
        )
    return None


def mlx_config_fields(family: str, config: dict) -> dict:
    """The fields of a base's config under the names that mlx-lm reads, where transformers 5 has others for them.

    Most families of mlx-lm read only the first, and would take a default without a word.

    Args:
        family: the base's `model_type`.
        config: its config, or that of an export.

    Raises:
        ValueError: the family of mlx-lm cannot express what the config says; the message says what.
    """
    return {**_rope_fields(family, config), **_pattern_fields(family, config)}


def _rope_fields(family: str, config: dict) -> dict:
    given = config.get("rope_parameters") or {}
    kinds = {kind: each for kind, each in given.items() if isinstance(each, dict)}
    if family in NESTED_ROPE:
        for each in kinds.values():
            _check_scaling(family, each)
        return {}
    if family in SPLIT_ROPE:
        return _split_rope(family, config, kinds)
    flat = next(iter(kinds.values()), given)
    if any(each != flat for each in kinds.values()):
        raise ValueError(f"{family} has there one rotary embedding for all layers, not one for each of layer_types")
    rope = config.get("rope_scaling") or flat  # in this order, as in transformers
    _check_scaling(family, rope)
    return _named(family, rope) if given else {}


def _split_rope(family: str, config: dict, kinds: dict[str, dict]) -> dict:
    full = {**kinds.get(FULL, {}), **(config.get("rope_scaling") or {})}
    local = kinds.get(SLIDING, {})
    _check_scaling(family, full)
    if scaling_type(local) != "default":
        raise ValueError(f"{family} has there no RoPE scaling {scaling_type(local)} in layers of sliding attention")
    if not kinds:
        return {}
    named, theta = _named(family, full), local.get("rope_theta")
    if family == "gemma3_text":
        return {**named, **({} if theta is None else {"rope_local_base_freq": theta})}
    if theta is not None and theta != named.get("rope_theta", config.get("rope_theta", theta)):
        raise ValueError(f"{family} has there one rope_theta for all layers, not one for each of layer_types")
    return named


def _named(family: str, rope: dict) -> dict:
    """A rotary embedding under its names of transformers 4."""
    theta, part = ("rotary_emb_base", "rotary_pct") if family == "gpt_neox" else ("rope_theta", "partial_rotary_factor")
    known = {theta: rope.get("rope_theta"), part: rope.get("partial_rotary_factor")}
    kind = scaling_type(rope)
    scaling = None if kind == "default" else {**rope, "type": kind, "rope_type": kind}
    return {**{name: value for name, value in known.items() if value is not None}, "rope_scaling": scaling}


def scaling_type(rope: dict) -> str:
    """The type of scaling of a rotary embedding."""
    return rope.get("rope_type") or rope.get("type") or "default"


def _check_scaling(family: str, rope: dict) -> None:
    """Raise ValueError unless mlx-lm scales a rotary embedding as transformers does."""
    scaling = scaling_type(rope)
    if scaling != "default" and scaling not in FEWER_SCALINGS.get(family, SCALINGS):
        raise ValueError(f"{family} has there no RoPE scaling {scaling}")
    given, factor = rope.get("attention_factor"), rope.get("factor") or 1.0
    usual = 0.1 * math.log(max(factor, 1.0)) + 1
    if scaling == "yarn" and given is not None and not math.isclose(given, usual, rel_tol=1e-6):
        raise ValueError(f"the attention_factor {given} of its RoPE scaling is not read there, which takes {usual:.6g}")


def _pattern_fields(family: str, config: dict) -> dict:
    """Which layers have full attention, for families that do not read `layer_types` as transformers does."""
    if family == "exaone4" and config.get("sliding_window") is None:
        return {"sliding_window_pattern": None}
    if family in WITHOUT_KINDS and "layer_types" in config:
        return {"layer_types": None}
    is_full = [kind == FULL for kind in config.get("layer_types") or ()]
    if not is_full:
        period = config.get("sliding_window_pattern")
        if family == "exaone4" and isinstance(period, int):
            return {"sliding_window_pattern": "L" * (period - 1) + "G"}
        return {}
    if family in BOTH_KINDS and len(set(is_full)) == 1:
        raise ValueError(f"{family} needs there layers of full and of sliding attention, and layer_types has one kind")
    if family == "exaone4":
        return {"sliding_window_pattern": "".join("LG"[each] for each in is_full)}
    if family not in INTERVALS:
        return {}
    every = is_full.index(True) + 1 if True in is_full else len(is_full) + 1
    if every > len(is_full) or is_full != [(number + 1) % every == 0 for number in range(len(is_full))]:
        raise ValueError(f"{family} has there full attention in every n-th layer, and layer_types says otherwise")
    return {INTERVALS[family]: every}


def _layers_text(layers: tuple[int, ...]) -> str:
    """The layers that a path leaves out, and what that means for mlx-lm."""
    runs = [f"{start}" if stop == start + 1 else f"{start} to {stop - 1}" for start, stop in joined_runs(layers)]
    one, cache, it = ("layer", "cache", "it") if len(layers) == 1 else ("layers", "caches", "them")
    return f"{one} {' and '.join(runs)}, whose {cache} would stay empty, and mlx-lm's batches need {it}"


def is_too_old(version: str) -> bool:
    """Whether a release of mlx-lm is older than the first that was tried."""
    return _numbers(version) < _numbers(MLX_LM)


def not_on_mlx(reason: str) -> str:
    """The message for a model that MLX does not loop."""
    return f"cannot run this looped model on MLX: {reason}"


def _numbers(version: str) -> list[int]:
    return [int(part) if part.isdigit() else 0 for part in version.split(".")[:3]]
