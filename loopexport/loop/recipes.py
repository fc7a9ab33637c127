"""Loops as other tools write them: RYS's pair and mergekit's slices, with what they say about the other fields."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from loopexport.errors import SpecError

from .mergekit import Slices, read_mergekit
from .presets import find_preset, preset_fields
from .spec import PLACES, has_own_steps

# Fields that hold for every way to say which layers loop.
KEPT = {"decode", "first_n"}

# What a repeated layer is in the models of RYS and mergekit; other values may be given with RYS's pair.
REPEATED = {"steps": 2, "damping": 1.0, "kv": "per_step"}


def overridden(below: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a loop with others below them.

    Whichever of span, path and so on is given, it hides the others below. If it is another of them than the one below,
    it hides all fields below that say how those layers loop: only `KEPT` stay. A span with its own K hides steps.
    """
    place = _place(given)
    place_below = _place(below) or ("span" if below.get("preset") is not None else None)  # a preset has a span
    hidden = {*(PLACES if place else ()), *(["steps"] if has_own_steps(given.get("span")) else ())}
    if place and place_below and place != place_below:
        hidden = below.keys() - KEPT
    return {**{name: value for name, value in below.items() if name not in hidden}, **given}


def _place(fields: Mapping[str, Any]) -> str | None:
    """Which field says which layers loop, if any."""
    return next((place for place in PLACES if fields.get(place) is not None), None)


class Recipe:
    """The loop that a user gave for a base whose layers are not known yet.

    Attributes:
        fields: the fields of its spec.
        preset: the name of the preset for fields that were not given, if any.
        slices: the mergekit config that gave the path, if any.
    """

    def __init__(self, given: Mapping[str, Any], preset: str | None = None):
        """
        Args:
            given: the fields of `LoopSpec` that were given, `rys` and `from_mergekit` too.
            preset: the name of a preset for the other fields.

        Raises:
            SpecError: there is no such preset, or more than one of span, path, rys and from_mergekit, or one of the
                last three with a preset, or steps with a path.
        """
        places = [place for place in PLACES if given.get(place) is not None]
        if len(places) > 1:
            raise SpecError(f"{places[0]} and {places[1]} both say which layers loop; give one of them")
        if preset is not None and places and places != ["span"]:
            raise SpecError(f"{places[0]} and preset {preset} both say which layers loop; give one of them")
        _check_steps_of_path(given)
        below = preset_fields(preset) if preset is not None else {}
        self.fields = overridden(below, given)
        self.preset = preset
        self._has_presets_span = preset is not None and not places
        self.slices: Slices | None = None
        self._rys = self.fields.pop("rys", None)
        file = self.fields.pop("from_mergekit", None)
        if self._rys is not None:
            self.fields = {**_repeated(self.fields), **self.fields, "span": parse_rys(self._rys)}
        if file is not None:
            self.slices = read_mergekit(file)
            self.fields["path"] = self.slices.path

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say in an error about the loop where it came from, if not from the user's own span or path."""
        try:
            yield
        except SpecError as error:
            raise SpecError(self._explanation(str(error))) from None

    def _explanation(self, error: str) -> str:
        if self._rys is not None:
            start, stop = self.fields["span"]
            return f"rys {start},{stop} is span {start}:{stop}, twice: {error}"
        if self.slices is not None:
            return f"mergekit config {self.slices.file}: {error}"
        if self.preset is not None and self._has_presets_span:
            cell = find_preset(self.preset)
            return (
                f"{error}; that is the span of preset {self.preset}, for {cell.model_type} with {cell.num_layers} "
                "layers: give one for this model with --span"
            )
        return error


def _check_steps_of_path(given: Mapping[str, Any]) -> None:
    """Refuse steps beside a path: 2 is only how a config says that the path is on."""
    place, steps = _place(given), given.get("steps")
    if place in ("path", "from_mergekit") and steps not in (None, 1):
        raise SpecError(
            f"steps {steps!r} and {place} were given, and a path says how often each layer runs: leave steps out "
            "(steps 1 is the base model)"
        )


def parse_rys(pair) -> tuple[int, int]:
    """Parse RYS's (i, j): layers 0 to j-1 run, then layers i to the last, so that layers i to j-1 run twice.

    Raises:
        SpecError: it is no such pair.

    Source: the README of github.com/dnhkng/RYS, where (0, 0) is the base model.
    """
    found = (
        re.fullmatch(r"\(?\s*([0-9]{1,9})\s*,\s*([0-9]{1,9})\s*\)?", pair.strip()) if isinstance(pair, str) else None
    )
    i, j = map(int, found.groups()) if found else _numbers(pair)
    if i >= j:
        remedy = "that is the base model" if (i, j) == (0, 0) else "give I < J"
        raise SpecError(f"rys {i},{j} runs no layer twice: {remedy}; 12,15 runs layers 12 to 14 twice")
    return i, j


def _numbers(pair) -> tuple[int, int]:
    is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2
    if not is_pair or not all(type(number) is int and number >= 0 for number in pair):
        raise SpecError(f"rys {pair!r} is not I,J, two layer numbers such as 12,15, which runs layers 12 to 14 twice")
    return pair[0], pair[1]


def _repeated(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of RYS's pair; damping 1 is one for the Euler rule."""
    is_euler = fields.get("rule") in (None, "euler")
    return {name: value for name, value in REPEATED.items() if name != "damping" or is_euler}
