"""Frozen routing: iterations reuse what the routers of sparse MoE layers answered in the natural pass.

Copied byte for byte into every exported directory; it needs torch alone.

A router is known by its path in the layer, not as a module: quantizers, adapters and parallelisation replace modules.
While a layer runs, a stand-in shadows the router in the instance dictionary of the block that asks it, where Python
looks before nn.Module does. A hook would be lost with its module, and none can be set inside a compiled graph.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

# What native layers call the module that chooses experts, wherever it is; `gate` is another name beside experts only.
ROUTERS = ("router", "router_gate")


class RecordRoute:
    """Stands in for a router: asks it, and keeps the answers in order."""

    def __init__(self, router, answers: list):
        self.router = router
        self.answers = answers
        self.count = 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        self.answers.append(self.router(*args, **kwargs))
        return self.answers[-1]

    def __getattr__(self, name):
        return getattr(self.router, name)


class ReplayRoute(RecordRoute):
    """Stands in for a router: gives the recorded answers, in order."""

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.answers[min(self.count, len(self.answers)) - 1]


@contextmanager
def routing(layer: nn.Module, stand_in, routes: dict[str, list]):
    """Put `stand_in` in place of a layer's routers while the layer runs.

    Args:
        layer: the decoder layer.
        stand_in: `RecordRoute` or `ReplayRoute`.
        routes: by path of the router in the layer, its answers in the natural pass.

    Raises:
        ValueError: a router was not asked, or not as often as in the natural pass.
    """
    shadowed = []
    for path, answers in routes.items():
        block, name = _split(path)
        shadowed.append((vars(layer.get_submodule(block)), name))
        shadowed[-1][0][name] = stand_in(layer.get_submodule(path), answers)
    try:
        yield
        for path, (namespace, name) in zip(routes, shadowed, strict=True):
            _check_asked(path, namespace[name])
    finally:
        for namespace, name in shadowed:
            del namespace[name]


def _check_asked(path: str, stand_in) -> None:
    if stand_in.count == 0 or stand_in.count != len(stand_in.answers):
        raise ValueError(
            f"cannot freeze the routing: {path} was asked {stand_in.count} times in a pass, and "
            f"{len(stand_in.answers)} times in the natural one, so something else chooses the experts; switch "
            "frozen_routing off"
        )


def _split(path: str) -> tuple[str, str]:
    """A module's path as its parent's path and its own name."""
    parent, _, name = path.rpartition(".")
    return parent, name


class Routers(NamedTuple):
    """How the experts of a layer are chosen.

    Attributes:
        known: paths of the routers in the layer.
        missing: paths of modules with experts for which no router was found.
    """

    known: tuple[str, ...]
    missing: tuple[str, ...]

    @classmethod
    def of(cls, layer: nn.Module) -> Routers:
        """Routers are called `router` or `router_gate`, or `gate` beside experts; they sit beside or in the experts."""
        paths = [path for path, _ in layer.named_modules() if path]
        experts = [path for path in paths if _has_experts(_split(path)[1], layer.get_submodule(path))]
        blocks = {_split(path)[0] for path in experts}
        known = [path for path in paths if _is_router(*_split(path), blocks)]
        askers = {_split(path)[0] for path in known}
        outermost = [path for path in experts if not any(path.startswith(f"{other}.") for other in experts)]
        missing = [
            path
            for path in outermost
            if _split(path)[0] not in askers and not any(router.startswith(f"{path}.") for router in known)
        ]
        return cls(tuple(known), tuple(missing))


def _is_router(parent: str, name: str, blocks_of_experts: set[str]) -> bool:
    return name in ROUTERS or (name == "gate" and parent in blocks_of_experts)


def _has_experts(name: str, module: nn.Module) -> bool:
    """Whether a module is a choice of experts, by its name or class; experts that all tokens share are no choice."""
    names = f"{name} {type(module).__name__}".lower()
    return ("expert" in names and "share" not in names) or names.endswith("moe")
