"""The outcome of one check, as `verify` reports it."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Check:
    """Outcome of one check.

    Attributes:
        name: the invariant, as a sentence.
        passed: True or False; None where the invariant does not apply, as `detail` explains.
        detail: what was seen.
        difference: the largest absolute difference that was measured, if the check measures one.
    """

    name: str
    passed: bool | None
    detail: str
    difference: float | None = None

    def to_dict(self) -> dict:
        """The outcome for `--json`."""
        return asdict(self)
