"""Policy `shared` over recurrent layers: iterations read what the natural pass remembers, with their own questions.

Every export has a copy of this file. It needs only torch and transformers.

A recurrent mixer (linear attention, a state space, a gated short convolution) runs two kernels: a short causal
convolution, and a scan, which moves a state along the tokens and reads it with queries. In an iteration

- the convolution at a token sees the natural inputs of earlier tokens, and the iterate's own input of this token;
- the scan starts from the natural state, takes up the natural keys, values, decays and step sizes, and is read with the
  iterate's own queries (C of a state space). So its state at each token is the natural one;
- what only the current token uses is the iterate's own: output gates, and the skip term D x of a state space.

Kernels are global functions of the native module. A mixer runs a copy of its own `forward` whose globals have our
functions in place of the kernels: they record the arguments in the natural pass and replace them in an iteration, and
call the native kernel. Nothing of the native module changes.
"""

from __future__ import annotations

import functools
import inspect
import re
import threading
import types
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from .looped_arguments import CacheArgument, find_cache_argument
from .looped_cache import NaturalPass, SharedRead
from .looped_states import STATE_CALLS, NaturalStates

CONVOLUTIONS = ("causal_conv1d_fn", "causal_conv1d_update")


class Scan(NamedTuple):
    """The arguments of a scan kernel.

    Attributes:
        natural: the arguments that its state depends on, by name, with their positions.
        skips: whether it also adds D x, and multiplies by silu(z) if it gets a z.
        has_tokens: whether x has a dimension for tokens or heads that D lacks.
    """

    natural: dict[str, int]
    skips: bool = False
    has_tokens: bool = False


_DELTA_RULE = Scan({"key": 1, "value": 2, "g": 3, "beta": 4})
_STATE_SPACE = Scan({"hidden_states": 0, "dt": 1, "B": 3}, skips=True, has_tokens=True)
_STATE_SPACE_STEP = Scan({"hidden_states": 1, "dt": 2, "B": 4}, skips=True)

# The scan kernels of transformers by name; the iterate keeps all arguments but the natural ones.
SCANS = {
    "torch_chunk_gated_delta_rule": _DELTA_RULE,
    "torch_recurrent_gated_delta_rule": _DELTA_RULE,
    "chunk_kimi_delta_attention": _DELTA_RULE,
    "recurrent_kimi_delta_attention": _DELTA_RULE,
    "mamba2_chunk_scan": _STATE_SPACE,
    "mamba2_selective_state_update": _STATE_SPACE_STEP,
    "mamba_selective_scan": _STATE_SPACE,
    "mamba_selective_state_update": _STATE_SPACE_STEP,
}
SKIP_WEIGHT = ("D", 6)  # the argument of state spaces for D, and its position where it has one

# Names in the code of mixers that keep a state elsewhere: in older caches, in families' own caches, or in the module.
FOREIGN_STATE = re.compile(r"(conv|ssm|recurrent|linear)(1d)?_(states?|cache)$")


class MixerRecord:
    """What a mixer did in the natural pass.

    Attributes:
        inputs: the inputs of its convolution, `(batch, channels, past + chunk)`.
        scans: the natural arguments of each call of a scan kernel, by name.
        convolutions: how many convolutions it ran.
    """

    def __init__(self):
        self.inputs: Any = None
        self.scans: list[dict[str, Any]] = []
        self.convolutions = 0

    def convolve(self, name: str, kernel, args, kwargs):
        inputs = args[0]
        if name == "causal_conv1d_update":  # it changes the state in place
            inputs = torch.cat([args[1], inputs], dim=-1)
        self.inputs = inputs
        self.convolutions += 1
        return kernel(*args, **kwargs)

    def scan(self, scan: Scan, kernel, args, kwargs):
        self.scans.append({name: _value(args, kwargs, name, position) for name, position in scan.natural.items()})
        return kernel(*args, **kwargs)


class MixerReplay:
    """What a mixer does in an iteration.

    Attributes:
        record: what it did in the natural pass.
        count: how many scans it ran.
    """

    def __init__(self, record: MixerRecord):
        self.record = record
        self.count = 0

    def convolve(self, name: str, kernel, args, kwargs):
        weight, bias = (_value(args, kwargs, *each) for each in (("weight", 1), ("bias", 2)))
        if kwargs.get("seq_idx") is not None:
            raise ValueError("kv shared cannot loop recurrent layers over packed sequences; pad them instead")
        return _convolve(self.record.inputs, args[0], weight, bias, kwargs.get("activation"))

    def scan(self, scan: Scan, kernel, args, kwargs):
        natural = self.record.scans[self.count]
        self.count += 1
        args_natural, kwargs_natural = _with(args, kwargs, scan.natural, natural)
        output = kernel(*args_natural, **kwargs_natural)
        if not scan.skips:
            return output
        own = _value(args, kwargs, "hidden_states", scan.natural["hidden_states"])
        return _add(output, _skip(own - natural["hidden_states"], scan, args, kwargs))


def _convolve(natural, own, weight, bias, activation):
    """A causal depthwise convolution whose window holds the iterate's own input of each token, and natural ones before.

    Args:
        natural: inputs of the natural pass, `(batch, channels, past + chunk)`.
        own: inputs of the iterate, `(batch, channels, chunk)`.
        weight: `(channels, width)`.
    """
    width = weight.shape[-1]
    earlier = functional.pad(natural, (width - 1, 0))[..., :-1].to(weight.dtype)
    output = functional.conv1d(earlier, weight[:, None, :-1], bias, groups=weight.shape[0])[..., -own.shape[-1] :]
    output = output + weight[:, -1:] * own
    return (output if activation is None else ACT2FN[activation](output)).to(own.dtype)


def _skip(difference, scan: Scan, args, kwargs):
    """The skip term of a state space, for the difference between the iterate's x and the natural one."""
    weight, gate = _value(args, kwargs, *SKIP_WEIGHT), kwargs.get("z")
    if weight is None:
        return torch.zeros_like(difference)
    term = (weight[..., None] if scan.has_tokens else weight) * difference
    return term if gate is None else term * functional.silu(gate)


def _add(output, term):
    if isinstance(output, tuple):
        return (_add(output[0], term), *output[1:])
    return (output + term).to(output.dtype)


def _value(args, kwargs, name: str, position: int):
    return kwargs[name] if name in kwargs else args[position] if position < len(args) else None


def _with(args, kwargs, positions: dict[str, int], values: dict[str, Any]):
    """The arguments of a call with some of them replaced."""
    args, kwargs = list(args), dict(kwargs)
    for name, value in values.items():
        if name in kwargs:
            kwargs[name] = value
        else:
            args[positions[name]] = value
    return args, kwargs


class _Thread(threading.local):
    """What the mixer that runs in this thread does; None outside of one."""

    def __init__(self):  # once in each thread
        self.run: MixerRecord | MixerReplay | None = None


_THREAD = _Thread()


def _convolution_in(module_globals: dict, name: str):
    native = module_globals.get(name)

    def convolution(*args, **kwargs):
        run: Any = _THREAD.run
        if module_globals[name] is not native and isinstance(run, MixerReplay):
            raise ValueError(f"kv shared computes {name} by itself, and somebody replaced it; use kv per_step")
        return run.convolve(name, module_globals[name], args, kwargs)

    return convolution


def _scan_in(module_globals: dict, name: str):
    def scan(*args, **kwargs):
        run: Any = _THREAD.run
        return run.scan(SCANS[name], module_globals[name], args, kwargs)

    return scan


def _tapped(forward):
    """A copy of a forward that calls our functions in place of the kernels, with all of its decorators.

    Returns:
        The copy, and a function that brings its globals up to date with those of the native module.
    """
    inner = getattr(forward, "__wrapped__", None)
    if inner is None:
        module_globals = forward.__globals__
        ours = {name: _convolution_in(module_globals, name) for name in CONVOLUTIONS}
        ours |= {name: _scan_in(module_globals, name) for name in SCANS if name in module_globals}
        own_globals = {**module_globals, **ours}
        del own_globals["__name__"]  # by this name, torch.compile would look the kernels up in the native module
        names = [name for name in forward.__code__.co_names if name in module_globals and name not in ours]
        return _copied(forward, own_globals, forward.__closure__), functools.partial(
            _refresh, own_globals, module_globals, names
        )
    tapped, refresh = _tapped(inner)
    cells = [types.CellType(tapped) if cell.cell_contents is inner else cell for cell in forward.__closure__]
    return _copied(forward, forward.__globals__, tuple(cells)), refresh


def _refresh(own_globals: dict, module_globals: dict, names: list[str]) -> None:
    own_globals.update((name, module_globals[name]) for name in names)


def _copied(function, function_globals: dict, closure):
    copied = types.FunctionType(function.__code__, function_globals, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


class MixerForward:
    """The `forward` of a mixer: its own, but with our functions in place of the kernels if a loop shares its memory.

    Attributes:
        mixer: the module.
        path: its path in the layer.
        cache_argument: its argument for the cache.
        scans: whether it runs a scan behind its convolution.
    """

    def __init__(self, mixer: nn.Module, path: str):
        self.__setstate__({"mixer": mixer, "path": path})

    def __getstate__(self):  # the copied function cannot be pickled
        return {"mixer": self.mixer, "path": self.path}

    def __setstate__(self, state: dict):
        self.mixer, self.path = state["mixer"], state["path"]
        self.native = native = type(self.mixer).forward
        self.scans = not _kernels(native).isdisjoint(SCANS)
        self.cache_argument: CacheArgument | None = find_cache_argument(self.mixer.__class__)
        self.tapped, self.refresh = _tapped(native)

    def __call__(self, *args, **kwargs):
        cache = None if self.cache_argument is None else self.cache_argument.value_in((self.mixer, *args), kwargs)
        if type(self.mixer).forward is not self.native:  # somebody replaced it since; `shared` will see no record
            return type(self.mixer).forward(self.mixer, *args, **kwargs)
        if isinstance(cache, NaturalPass) and cache.is_shared:
            record = cache.states.mixers[self.path] = MixerRecord()
            return self._run(record, args, kwargs)
        if isinstance(cache, SharedRead):
            return self._run(MixerReplay(cache.states.mixers[self.path]), args, kwargs)
        return self.native(self.mixer, *args, **kwargs)

    def _run(self, run, args, kwargs):
        if not torch.compiler.is_compiling():
            self.refresh()
        before, _THREAD.run = _THREAD.run, run
        try:
            return self.tapped(self.mixer, *args, **kwargs)
        finally:
            _THREAD.run = before


def _replicated(mixer: nn.Module) -> nn.Module:
    """A replica of a mixer for nn.DataParallel, which copies what the instance holds, with a forward of its own."""
    replica = type(mixer)._replicate_for_data_parallel(mixer)
    vars(replica)["forward"] = MixerForward(replica, vars(mixer)["forward"].path)
    return replica


class Mixers(NamedTuple):
    """The modules of a layer that keep a recurrent state.

    Attributes:
        known: paths of those whose kernels we know, and whether each runs a scan.
        unknown: names of the classes of the others, which kv shared cannot loop.
        foreign: names of the classes that keep a state where no stand-in can reach it.
    """

    known: dict[str, bool]
    unknown: tuple[str, ...]
    foreign: tuple[str, ...]

    @classmethod
    def prepared(cls, layer: nn.Module) -> Mixers:
        """Find the mixers of a native layer, and give the known ones a `MixerForward`."""
        known, unknown, foreign = {}, [], []
        for path, module in layer.named_modules():
            native: Any = type(module)
            names = _names(native, native.forward)
            if any(FOREIGN_STATE.search(name) for name in names.difference(STATE_CALLS)):
                foreign.append(type(module).__name__)
            elif names.isdisjoint(STATE_CALLS):
                continue
            elif _is_known(type(module)):
                vars(module)["forward"] = MixerForward(module, path)
                vars(module)["_replicate_for_data_parallel"] = functools.partial(_replicated, module)
                known[path] = vars(module)["forward"].scans
            else:
                unknown.append(type(module).__name__)
        return cls(known, tuple(unknown), tuple(foreign))

    def check(self, layer: int, kv: str) -> None:
        """Raise ValueError if a layer, by its number, cannot be looped under a K/V policy."""
        if self.foreign:
            raise ValueError(
                f"cannot loop layer {layer}: {self.foreign[0]} keeps a recurrent state where the passes of a loop "
                "would overwrite each other's; choose another span, or a newer transformers"
            )
        if kv == "shared" and self.unknown:
            raise ValueError(
                f"cannot loop layer {layer} with kv shared: the code of {self.unknown[0]} does not keep what it "
                "remembers apart from what it asks; use kv per_step"
            )

    def check_recorded(self, states: NaturalStates) -> None:
        """Raise ValueError unless each mixer ran its kernels in the natural pass: one convolution, and scans if any."""
        if states and not self.known:
            raise ValueError("kv shared found a recurrent state, but no module whose code it knows; use kv per_step")
        for path, scans in self.known.items():
            record = states.mixers.get(path, MixerRecord())
            if record.convolutions != 1 or bool(record.scans) != scans:
                raise ValueError(
                    f"kv shared saw {record.convolutions} convolutions and {len(record.scans)} scans in {path}, so "
                    "something else than the native code computes them; use kv per_step"
                )

    def check_not_checkpointed(self) -> None:
        """Raise ValueError if there is a mixer: its record would not be part of what gradient checkpointing keeps."""
        if self.known:
            raise ValueError(
                "kv shared over recurrent layers does not work with gradient checkpointing; use kv per_step, or switch "
                "it off"
            )


def _is_known(mixer: type) -> bool:
    """Whether a mixer runs a convolution and at most one scan, and keeps no other state."""
    forward, names = mixer.forward, _names(mixer, mixer.forward)  # type: ignore[attr-defined]
    kernels = _kernels(forward)
    has_scan = not kernels.isdisjoint(SCANS)
    keeps_state = not names.isdisjoint(("get_recurrent_state", "update_recurrent_state"))
    return kernels.issuperset(CONVOLUTIONS) and has_scan == keeps_state and _can_be_tapped(forward)


def _can_be_tapped(forward) -> bool:
    """Whether each decorator of a forward holds what it decorates."""
    while hasattr(forward, "__wrapped__"):
        if not any(cell.cell_contents is forward.__wrapped__ for cell in forward.__closure__ or ()):
            return False
        forward = forward.__wrapped__
    return True


def _kernels(forward) -> set[str]:
    """The names of kernels that a forward calls."""
    return {name for name in inspect.unwrap(forward).__code__.co_names if name in SCANS or name in CONVOLUTIONS}


@functools.lru_cache(maxsize=None)
def _names(module: Any, forward) -> frozenset[str]:
    """The names in the code of a module's class, with this `forward`: attributes and globals."""
    members = [
        inspect.unwrap(each)
        for cls in module.__mro__
        if cls is not nn.Module
        for each in vars(cls).values()
        if callable(each)
    ]
    codes = [each.__code__ for each in members if isinstance(each, types.FunctionType)]
    return frozenset(name for code in codes for name in code.co_names)
