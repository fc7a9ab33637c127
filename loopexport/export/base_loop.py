"""A base with the loop that a user gave for it, checked against its layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from loopexport.base.checkpoint import Checkpoint
from loopexport.base.download import find_checkpoint
from loopexport.base.families import layer_types, text_config, vision_layers_added
from loopexport.errors import SpecError
from loopexport.loop.advice import loop_warnings
from loopexport.loop.auto_span import AUTO, auto_span, why_auto_span
from loopexport.loop.path import with_spans
from loopexport.loop.presets import find_preset
from loopexport.loop.recipes import Recipe
from loopexport.loop.spec import LoopSpec, check_first_n, make_spec
from loopexport.templates.looped_fit import (
    CROSS_ATTENTION,
    REUSED_KEYS,
    check_added_features,
    check_cross_attention,
    check_depth,
    check_layer_types,
    check_reused_keys,
)

from .directory import is_export, open_export

_FLAGS = {"spec_file": "--spec", "loop": "another loop"}  # options that are not called after their keyword


class BaseLoop(NamedTuple):
    """A base and its loop.

    Attributes:
        base: the checkpoint.
        spec: the loop; by spans if spans can express a path.
        warnings: about the loop, one line each.
    """

    base: Checkpoint
    spec: LoopSpec
    warnings: tuple[str, ...]


class LoopSource:
    """The loop that a user gave, valid in itself, for a base that is not known yet.

    Args:
        given: the fields of the loop that were given, with `rys` and `from_mergekit`.
        preset: the name of a preset for the other fields.

    Raises:
        SpecError: no model can have that loop.
    """

    def __init__(self, given: Mapping[str, Any], preset: str | None = None):
        self.recipe = Recipe(given, preset)
        fields = self.recipe.fields
        self.is_auto = fields.get("span") in (AUTO, (AUTO,), [AUTO])
        with self.recipe.explained():
            self.spec = make_spec(**{**fields, "span": (0, 1)} if self.is_auto else fields)
            check_first_n(self.spec, is_given="first_n" in fields)

    def on(self, base: Checkpoint, model: str) -> BaseLoop:
        """The loop on a base that the user called `model`.

        Raises:
            SpecError: the loop does not fit the base.
        """
        spec = make_spec(**{**self.recipe.fields, "span": auto_span(base)}) if self.is_auto else self.spec
        with self.recipe.explained():
            check_layers(base, spec)
            spec = with_spans(spec, base.num_layers)
        preset, slices = self.recipe.preset, self.recipe.slices
        warnings = [
            *([why_auto_span(base)] if self.is_auto else []),
            *(slices.warnings(base, model) if slices is not None else []),
            *loop_warnings(base, spec, find_preset(preset) if preset is not None else None),
        ]
        return BaseLoop(base, spec, tuple(warnings))


def find_loop(
    model: str | Path,
    given: Mapping[str, Any],
    *,
    preset: str | None = None,
    revision: str | None = None,
    without_adapter: bool = False,
    text_only: bool = False,
) -> BaseLoop:
    """The loop of an export, or one for a base. Downloads no weights.

    Args:
        model: an export, a local base, or a Hub id of a base.
        given: the fields of the loop of a base, with `rys` and `from_mergekit`; empty for an export.
        preset: the name of a preset for the other fields.
        revision, without_adapter, text_only: as for `convert`.

    Raises:
        LoopExportError: there is no such model, or no such loop of it.
    """
    if is_export(Path(model).expanduser()):
        check_export_options(
            model, given, preset=preset, revision=revision, without_adapter=without_adapter, text_only=text_only
        )
        export = open_export(model)
        return BaseLoop(export.base, export.spec, ())
    loop = LoopSource(given, preset)
    base = find_checkpoint(
        str(model), revision, headers_only=True, without_adapter=without_adapter, text_only=text_only
    )
    return loop.on(base, str(model))


def check_export_options(model: str | Path, loop: LoopSpec | Iterable[str] = (), **options: object) -> None:
    """Check that an export gets no options of a base.

    Args:
        model: the export.
        loop: a loop for it, or the names of the fields that were given.
        options: other options by name; None or False if they were not given.

    Raises:
        SpecError: it gets some; the message names them.
    """
    fields = ["loop"] if isinstance(loop, LoopSpec) else list(loop)
    given = [name for name, value in options.items() if value is not None and value is not False]
    names = [_FLAGS.get(name, f"--{name.replace('_', '-')}") for name in (*fields, *given)]
    if names:
        listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        own = " and has its own loop" if fields or "preset" in given else ""
        left = "it" if len(names) == 1 else "them"
        raise SpecError(f"{model} is an export{own}; give its base for {listed}, or leave {left} out")


def check_layers(base: Checkpoint, loop: LoopSpec) -> None:
    """Raise SpecError unless the base has the looped layers, and a loop can handle their memory."""
    try:
        check_depth(loop, base.num_layers)
        check_layer_types(loop, layer_types(base.config))
        check_reused_keys(loop, text_config(base.config).get(REUSED_KEYS), layer_types(base.config))
        check_cross_attention(loop, text_config(base.config).get(CROSS_ATTENTION))
        check_added_features(loop, vision_layers_added(base.config))
    except ValueError as error:
        raise SpecError(str(error)) from None
    layer = next((layer for layer in loop.layers if layer in base.unloopable_tensors), None)
    if layer is not None:  # the weights show it where the config does not
        raise SpecError(
            f"layer {layer} keeps more of the past than a cache of keys, values and states "
            f"({base.unloopable_tensors[layer]}), and cannot be run again: choose another span"
        )
