"""Frozen routing in MLX: iterations reuse what the routers of a layer answered in the natural pass.

Every export has a copy of this file. It needs only mlx.
"""

from __future__ import annotations

from typing import Any

# Names of modules that choose experts. A module named `gate` does so too, but only next to experts.
ROUTERS = ("router",)
GATE = "gate"


class RecordRoute:
    """Stands for a router in the natural pass: asks it, and records its answers in order."""

    def __init__(self, router: Any, answers: list):
        self._router = router
        self._answers = answers
        self._count = 0

    def __call__(self, *args, **kwargs):
        self._count += 1
        self._answers.append(self._router(*args, **kwargs))
        return self._answers[-1]

    def __getattr__(self, name):
        return getattr(self._router, name)

    def check(self, path: str) -> None:
        """Raise ValueError unless this pass asked the router, and as often as the natural pass."""
        if not self._count or self._count != len(self._answers):
            raise ValueError(
                f"cannot freeze the routing: a pass called {path} {self._count} times, the natural pass "
                f"{len(self._answers)} times, so something else chooses the experts; set loop_frozen_routing to false"
            )


class ReplayRoute(RecordRoute):
    """Stands for a router in an iteration: gives the recorded answers in order."""

    def __call__(self, *args, **kwargs):
        self._count += 1
        return self._answers[min(self._count, len(self._answers)) - 1]


def routers_of(layer: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of the routers in a layer, and of modules with experts but without a known router."""
    paths = [path for path, _ in layer.named_modules() if path]
    experts = [path for path in paths if _has_experts(path.rpartition(".")[2])]
    blocks = {path.rpartition(".")[0] for path in experts}
    known = [path for path in paths if _is_router(path, blocks)]
    askers = {path.rpartition(".")[0] for path in known}
    outermost = [path for path in experts if not any(path.startswith(f"{other}.") for other in experts)]
    missing = [path for path in outermost if path.rpartition(".")[0] not in askers]
    return tuple(known), tuple(missing)


def _is_router(path: str, blocks: set[str]) -> bool:
    parent, _, name = path.rpartition(".")
    return name in ROUTERS or (name == GATE and parent in blocks)


def _has_experts(name: str) -> bool:
    """Whether a module holds routed experts; experts that all tokens share do not count."""
    return name == "switch_mlp" or ("expert" in name and "share" not in name)
