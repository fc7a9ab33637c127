"""The result of one check of `verify`."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: the invariant, as a sentence.
        passed: whether it holds; None if it does not apply or was not proved, as `detail` explains.
        detail: what the check compared or found.
        difference: the largest absolute difference; None if the check does not measure one.
    """

    name: str
    passed: bool | None
    detail: str
    difference: float | None = None

    def to_dict(self) -> dict:
        """The result for `--json`."""
        return asdict(self)
