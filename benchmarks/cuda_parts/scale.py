"""Where and how large a run is: a GPU with models of real shapes, or a rehearsal on the CPU with tiny ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Where and how large.

    Attributes:
        device: torch's name of the device.
        provider: ONNX Runtime's provider as `OnnxModel` calls it.
        half: half-precision formats that both runtimes compute in there.
        real: whether to measure models of real shapes; else tiny ones.
        past: prompt lengths at which decoding is measured.
        new: tokens to decode in each measurement.
        rounds: measurements of each figure.
        workers: comparisons to run side by side.
    """

    device: str
    provider: str
    half: tuple[str, ...]
    real: bool
    past: tuple[int, ...]
    new: int
    rounds: int
    workers: int

    @property
    def has_graphs(self) -> bool:
        """Whether the device can capture and replay CUDA graphs."""
        return self.device == "cuda"


GPU = Scale("cuda", "cuda", ("fp16", "bf16"), real=True, past=(128, 4096), new=12, rounds=5, workers=8)
# ONNX Runtime's CPU provider has no bf16.
REHEARSAL = Scale("cpu", "cpu", ("fp16",), real=False, past=(8,), new=4, rounds=2, workers=1)
