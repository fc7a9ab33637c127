"""Comparisons that print the largest difference when they fail."""

from __future__ import annotations

import torch

TOLERANCE = 1e-5  # of the logits' scale, fp32
LARGEST: list[float] = []  # differences that the running test compared, of scale


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Assert that both are equal, up to `tolerance` times the largest absolute value of `theirs`."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    difference, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    relative = f"{difference / scale:.3g} of scale, allowed {tolerance:g}"
    LARGEST.append(difference / scale if scale else difference)
    assert difference <= tolerance * scale, f"largest difference {difference:.3g} is {relative}"


def assert_bitwise(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Assert that both are equal to the last bit."""
    difference = (ours.double() - theirs.double()).abs().max().item()
    assert torch.equal(ours, theirs), f"not bitwise equal, largest difference {difference:.3g}"


def assert_differs(ours: torch.Tensor, theirs: torch.Tensor, at_least: float = 1e-3) -> None:
    """Assert a difference larger than rounding: without one, a test of equality next to it proves nothing."""
    difference, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    relative = f"{difference / scale:.3g} of scale, expected more than {at_least:g}"
    assert difference > at_least * scale, f"largest difference {difference:.3g} is only {relative}"
