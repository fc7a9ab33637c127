"""The loop of an export, for its card: rows of the table, and what the formula below it means."""

from __future__ import annotations

from loopexport.loop.spec import LoopSpec
from loopexport.loop.wording import (
    describe_layers,
    describe_refinements,
    describe_rule,
    describe_skipped,
    describe_span,
    describe_steps,
    repeats_as_base,
)

_KV_MEANING = {
    "shared": "every iteration attends to the natural pass's keys and values",
    "per_step": "every pass has its own cache slots, as in a physically unrolled model",
    "reference": "iterations attend to the natural keys and values of the past and to their own in the current chunk, "
    "like the paper's authors",
}
_DECODE_MEANING = {
    "full": "every token loops",
    "bypass": "the prompt and other longer chunks loop; single-token decode steps run the base model",
    "first_n": "the prompt and the first {n} decode steps loop; later ones run the base model",
}


def loop_rows(spec: LoopSpec, num_layers: int) -> str:
    """The rows of the table that say which layers loop, and how."""
    return (_LOOP if spec.path is None else _PATH_OFF if spec.is_identity else _PATH).format(
        span=describe_span(spec),
        layers=describe_layers(spec),
        skipped=describe_skipped(spec, num_layers),
        last_layer=num_layers - 1,
        steps=describe_steps(spec),
        rule=describe_rule(spec),
        anchor=f"{spec.anchor:g}",
        mode=spec.mode,
        refinements=describe_refinements(spec),
    )


def kv_meaning(spec: LoopSpec) -> str:
    """What the K/V policy does, and whether cached decoding equals a full forward."""
    return f"{_KV_MEANING[spec.kv]}; {_cached_decoding(spec)}"


def decode_meaning(spec: LoopSpec) -> str:
    """Which tokens loop."""
    if spec.is_identity:
        return "no token loops: this is the base model"
    return _DECODE_MEANING[spec.decode].format(n=spec.first_n)


def legend(spec: LoopSpec) -> str:
    """The text between the table and the formula, or the layers of a path."""
    return _LEGEND if spec.path is None else _path_legend(spec)


def _cached_decoding(spec: LoopSpec) -> str:
    """Whether cached decoding equals a full forward, for the row of the K/V policy."""
    if spec.is_identity or (spec.decode == "full" and spec.kv != "reference"):
        return "cached decoding equals a full forward"
    why = ", in which all tokens loop" if spec.decode != "full" else ""
    return f"cached decoding does **not** equal a full forward{why}"


def _path_legend(spec: LoopSpec) -> str:
    """Which tokens go through the layers of a path, and how repeats run."""
    who = _PATH_USERS[spec.decode].format(n=spec.first_n)
    subject = f"With `loop_steps` 2, {who}" if spec.is_identity else who.capitalize()
    return f"{subject} through these layers, in this order, {_AS_BASE if repeats_as_base(spec) else _OTHER_KEYS}:"


_LOOP = """\
| span | `{span}`, half-open: {layers}; the model has layers 0 to {last_layer} |
| steps K | {steps} |
| update rule | {rule} |
| anchor (beta) | {anchor} |
| mode | `{mode}` |
| refinements | {refinements} |"""

_PATH = "| path | `{span}`, half-open: {layers} more than once{skipped}; the model has layers 0 to {last_layer} |"

_PATH_OFF = """\
| path | `{span}`, half-open, switched off: `loop_steps` is 1, and each layer runs once, as in the base model, until \
it is 2; the model has layers 0 to {last_layer} |"""

_LEGEND = """\
Here x are the hidden states that enter the span, and g is one run through it. In layer mode, each layer of the span
loops by itself, in turn."""

_PATH_USERS = {
    "full": "every token goes",
    "bypass": "the tokens of the prompt and of other longer chunks go",
    "first_n": "the tokens of the prompt and of the first {n} decode steps go",
}
_AS_BASE = "each time as in the base model"
_OTHER_KEYS = "where repeats attend to other keys and values than in the base model (see K/V policy)"
