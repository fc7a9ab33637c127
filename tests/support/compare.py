"""Comparisons that print the largest difference when they fail."""

from __future__ import annotations

import torch

TOLERANCE = 1e-5  # of the logits' scale, fp32


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal up to `tolerance` times the largest absolute value of `theirs`."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    difference, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert difference <= tolerance * scale, f"largest difference {difference:.3g} is {difference / scale:.3g} of scale"


def assert_bitwise(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal to the last bit."""
    difference = (ours.double() - theirs.double()).abs().max().item()
    assert torch.equal(ours, theirs), f"not bitwise equal, largest difference {difference:.3g}"


def assert_differs(ours: torch.Tensor, theirs: torch.Tensor, at_least: float = 1e-3) -> None:
    """Different by more than rounding, so that a test of equality beside this one means something."""
    difference, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert difference > at_least * scale, f"largest difference is only {difference / scale:.3g} of scale"
