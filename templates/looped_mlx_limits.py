"""Which loops MLX runs, decided from the spec alone.

Every export has a copy of this file. It needs only the standard library.
"""

from __future__ import annotations

from .looped_spec import UNSTABLE_RULES, LoopSpec

MODEL_FILE = "modeling_looped_mlx.py"  # the value of `model_file` in config.json
MLX_LM = "0.32.0"  # the first release of mlx-lm that runs such a file only with trust_remote_code


def mlx_loop_refusal(spec: LoopSpec, num_layers: int) -> str | None:
    """Why MLX does not run a loop in a model of `num_layers` layers, and what to do; None if it does."""
    skipped = spec.skipped(num_layers)
    if skipped:
        return (
            f"the path leaves out layer {skipped[0]}, whose cache would stay empty, and mlx-lm's batches need it; use "
            "a path that visits every layer"
        )
    if spec.decode != "full":
        return (
            f"decode {spec.decode} has to know which tokens are generated, and mlx-lm runs the last token of a prompt "
            "like one of them; set loop_decode to full"
        )
    if spec.kv == "reference":
        rule = f", and loop_rule to another than {spec.rule}" if spec.rule in UNSTABLE_RULES else ""
        return (
            "kv reference depends on where the prompt ended, and mlx-lm cuts a prompt into chunks; set loop_kv to "
            f"shared{rule}"
        )
    return None


def is_too_old(version: str) -> bool:
    """Whether a release of mlx-lm is older than the first that was tried."""
    return _numbers(version) < _numbers(MLX_LM)


def not_on_mlx(reason: str) -> str:
    """The message for a model that MLX does not loop."""
    return f"cannot run this looped model on MLX: {reason}"


def _numbers(version: str) -> list[int]:
    return [int(part) if part.isdigit() else 0 for part in version.split(".")[:3]]
