"""Frozen routing: iterations reuse the answers of the routers of sparse MoE layers in the natural pass.

Every export has a copy of this file. It needs only torch.

We store a router's path in its layer, not the module, because quantizers, adapters and parallelisation replace modules.
While a layer runs, a stand-in shadows the router: it is in the instance dictionary of the router's parent, where Python
looks before nn.Module does. A hook would be lost when its module is replaced, and cannot be set in a compiled graph.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

# Names of modules that choose experts. A module named `gate` does so too, but only next to experts.
ROUTERS = ("router", "router_gate")


class RecordRoute:
    """Stands in for a router in the natural pass: calls it, and records its answers in order."""

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
    """Stands in for a router in an iteration: returns the recorded answers in order."""

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.answers[min(self.count, len(self.answers)) - 1]


@contextmanager
def routing(layer: nn.Module, stand_in, routes: dict[str, list]):
    """Replace the routers of a layer by stand-ins while the layer runs.

    Args:
        layer: the decoder layer.
        stand_in: `RecordRoute` or `ReplayRoute`.
        routes: for each router, by its path in the layer, its answers in the natural pass.

    Raises:
        ValueError: a router was not called, or not as often as in the natural pass; switch frozen_routing off.
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
            f"cannot freeze the routing: a pass called {path} {stand_in.count} times, the natural pass "
            f"{len(stand_in.answers)} times, so something else chooses the experts; switch frozen_routing off"
        )


def _split(path: str) -> tuple[str, str]:
    """Split a module's path into its parent's path and its own name."""
    parent, _, name = path.rpartition(".")
    return parent, name


class Routers(NamedTuple):
    """The routers of a layer, which choose its experts.

    Attributes:
        known: paths of the routers in the layer.
        missing: paths of modules with experts but without a known router.
    """

    known: tuple[str, ...]
    missing: tuple[str, ...]

    @classmethod
    def of(cls, layer: nn.Module) -> Routers:
        """Find the routers of a layer: modules named `router` or `router_gate`, or `gate` next to experts."""
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
    """Whether a module holds routed experts, by its name or class; experts that all tokens share do not count."""
    names = f"{name} {type(module).__name__}".lower()
    return ("expert" in names and "share" not in names) or names.endswith("moe")
