"""What a user should know before a conversion: short warnings, one line each, based on measurements."""

from __future__ import annotations

from loopexport.base.checkpoint import Checkpoint
from loopexport.base.families import newest_outcome

from .presets import Preset, misfit, published_cell
from .spec import SPEC_KEYS, LoopSpec
from .wording import describe_numbers, describe_span

SMALL_MODEL_PARAMS = 3_000_000_000


def loop_warnings(base: Checkpoint, spec: LoopSpec, preset: Preset | None = None) -> list[str]:
    """All warnings for a loop on a base; `preset` is the preset that the user chose, if any."""
    if spec.is_identity:
        return ["this spec is the base model itself (steps 1 or anchor 1)"]
    return [
        *_left_out(base, spec),
        *_gain(base, spec, preset),
        *_small_model(base),
        *_cached_decoding(spec),
        *_routing(base, spec),
        *_family(base.model_type),
        *_quantised(base),
    ]


def _left_out(base: Checkpoint, spec: LoopSpec) -> list[str]:
    skipped = spec.skipped(base.num_layers)
    if not skipped:
        return []
    ends = ", so it ends before the last layer" if skipped[-1] == base.num_layers - 1 else ""
    return [f"the path leaves out {describe_numbers(skipped)}{ends}"]


def _gain(base: Checkpoint, spec: LoopSpec, preset: Preset | None) -> list[str]:
    published = published_cell(base, spec)
    if published is not None:
        return [f"published for this model and loop ({published.status}): {result}" for result in published.results]
    unproven = ["a gain is unproven for this model and this loop: compare with the base on your own task"]
    if preset is None:
        return unproven
    changed = [name for name in SPEC_KEYS if getattr(preset.spec, name) != getattr(spec, name)]
    other = misfit(preset, base)
    if other and "span" not in changed:
        other += f": its span {describe_span(spec)} is used unscaled; --span sets another"
    return [
        *filter(None, [other]),
        *([f"this loop differs from preset {preset.name} in {', '.join(changed)}"] if changed else []),
        *unproven,
    ]


def _small_model(base: Checkpoint) -> list[str]:
    small = 0 < base.num_params < SMALL_MODEL_PARAMS and base.quantisation is None
    return ["models under 3B parameters gained nothing in reproductions"] if small else []


def _cached_decoding(spec: LoopSpec) -> list[str]:
    if spec.kv != "reference":
        return []
    equal = "; with kv shared they are equal" if spec.decode == "full" else ""
    return [f"kv reference: by design, cached decoding differs from a full forward{equal}"]


def _routing(base: Checkpoint, spec: LoopSpec) -> list[str]:
    if not base.is_sparse and spec.frozen_routing:
        return ["frozen routing changes nothing here: the base has no experts"]
    if not base.is_sparse or spec.frozen_routing or spec.path is not None:
        return []
    return [
        "sparse experts without frozen routing: the authors saw 28-37 % of tokens change experts after one iteration; "
        "--frozen-routing keeps the experts of the natural pass"
    ]


def _family(model_type: str) -> list[str]:
    status, reason = newest_outcome(model_type)
    if status == "works":
        return []
    known = {"in part": f"works in part ({reason})", "no span": reason, "untried": f"was not tested ({reason})"}
    return [f"family {model_type} {known.get(status, 'was never tested')}: check the export with `loopexport verify`"]


def _quantised(base: Checkpoint) -> list[str]:
    if base.quantisation is None:
        return []
    return [f"the base is quantised with {base.quantisation}: the export needs the same libraries as the base"]
