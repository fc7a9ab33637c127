"""Frozen routing: iterations reuse the answers of the routers of sparse MoE layers in the natural pass.

Every export has a copy of this file. It needs only torch.

We store a router's path in its layer, not the module, because quantizers, adapters and parallelisation replace modules.
A router keeps its class and its place; its `forward` becomes a `RouterForward`. What a call records or replays is local
to the thread. A hook would not do: it cannot skip the router, and cannot be set in a compiled graph.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

# Names of modules that choose experts. A module named `gate` does so too, but only next to experts.
ROUTERS = ("router", "router_gate")


class _Thread(threading.local):
    """The routes of the layer that runs in this thread, by the path of the router; None outside of one."""

    def __init__(self):  # once in each thread
        self.routes: dict[str, RecordRoute] | None = None


class RecordRoute:
    """What a router does in the natural pass: compute its answers, and record them in order.

    Attributes:
        router: the module.
        answers: its answers in the natural pass.
        count: how often this pass has called it.
    """

    def __init__(self, router: nn.Module, answers: list):
        self.router = router
        self.answers = answers
        self.count = 0

    def answer(self, forward, args, kwargs):
        self.count += 1
        self.answers.append(forward(*args, **kwargs))
        return self.answers[-1]


class ReplayRoute(RecordRoute):
    """What a router does in an iteration: return the recorded answers in order."""

    def answer(self, forward, args, kwargs):
        self.count += 1
        return self.answers[min(self.count, len(self.answers)) - 1]


_THREAD = _Thread()


class RouterForward:
    """The `forward` of a router: its own, but for a thread that records or replays its answers.

    Attributes:
        router: the module.
        path: its path in the layer.
        replaced: the `forward` that somebody had set on the module, such as accelerate; None for its class's.
    """

    def __init__(self, router: nn.Module, path: str):
        self.router = router
        self.path = path
        replaced = vars(router).get("forward")  # a replica of nn.DataParallel has that of the original
        self.replaced: Any = replaced.replaced if isinstance(replaced, RouterForward) else replaced

    def __call__(self, *args, **kwargs):
        router: Any = self.router
        forward = self.replaced or type(router).forward.__get__(router)
        route = (_THREAD.routes or {}).get(self.path)
        if route is None or route.router is not router:
            return forward(*args, **kwargs)
        return route.answer(forward, args, kwargs)


@contextmanager
def routing(layer: nn.Module, route: type[RecordRoute], routes: dict[str, list]):
    """Let the routers of a layer record or replay their answers while the layer runs in this thread.

    Args:
        layer: the decoder layer.
        route: `RecordRoute` or `ReplayRoute`.
        routes: for each router, by its path in the layer, its answers in the natural pass.

    Raises:
        ValueError: a router was not called, or not as often as in the natural pass; switch frozen_routing off.
    """
    if not routes:
        yield
        return
    used = {path: route(_routable(layer, path), answers) for path, answers in routes.items()}
    before, _THREAD.routes = _THREAD.routes, used
    try:
        yield
    finally:
        _THREAD.routes = before
    for path, each in used.items():
        _check_asked(path, each)


@contextmanager
def own_routing():
    """Let a forward inside of another one choose its own experts."""
    before, _THREAD.routes = _THREAD.routes, None
    try:
        yield
    finally:
        _THREAD.routes = before


def _routable(layer: nn.Module, path: str) -> nn.Module:
    """The router at a path, with a `RouterForward`."""
    router = layer.get_submodule(path)
    if getattr(vars(router).get("forward"), "router", None) is not router:
        vars(router)["forward"] = RouterForward(router, path)
    return router


def _check_asked(path: str, route: RecordRoute) -> None:
    if route.count == 0 or route.count != len(route.answers):
        raise ValueError(
            f"cannot freeze the routing: a pass called {path} {route.count} times, the natural pass "
            f"{len(route.answers)} times, so something else chooses the experts; switch frozen_routing off"
        )


def split(path: str) -> tuple[str, str]:
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
        experts = [path for path in paths if _has_experts(split(path)[1], layer.get_submodule(path))]
        blocks = {split(path)[0] for path in experts}
        known = [path for path in paths if _is_router(*split(path), blocks)]
        askers = {split(path)[0] for path in known}
        outermost = [path for path in experts if not any(path.startswith(f"{other}.") for other in experts)]
        missing = [
            path
            for path in outermost
            if split(path)[0] not in askers and not any(router.startswith(f"{path}.") for router in known)
        ]
        return cls(tuple(known), tuple(missing))


def _is_router(parent: str, name: str, blocks_of_experts: set[str]) -> bool:
    return name in ROUTERS or (name == "gate" and parent in blocks_of_experts)


def _has_experts(name: str, module: nn.Module) -> bool:
    """Whether a module holds routed experts, by its name or class; experts that all tokens share do not count."""
    names = f"{name} {type(module).__name__}".lower()
    return ("expert" in names and "share" not in names) or names.endswith("moe")
