"""Keys and values of the tokens so far, in memory that is allocated with room for more.

portable    a run reads one storage and writes past and new positions into another
gqa         a run adds the new positions to the storage that it reads
"""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np

from .session import PROVIDERS, quiet_options, small_graph

_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16; numpy has no such type
PAST, PRESENT = "past_key_values.", "present."

_SPARE_POSITIONS = 256  # the least number of positions to allocate room for at once


@dataclass
class Storage:
    """One tensor of ONNX Runtime for each cache input.

    Attributes:
        values: `(batch, kv_heads, room, head_size)` by input name, on the session's device.
        layout: how graphs read it; see `CacheSlots`.
        filled: the number of positions that belong to a cache.
    """

    values: dict[str, Any]
    layout: tuple
    filled: int = 0
    _lock: Any = field(default_factory=Lock, repr=False, compare=False)

    @property
    def room(self) -> int:
        """The number of positions that fit."""
        return min((value.shape()[2] for value in self.values.values()), default=0)

    @property
    def batch(self) -> int:
        """The number of rows."""
        return next(iter(self.values.values())).shape()[0]

    def claim(self, start: int, stop: int) -> bool:
        """Take the positions from `start` to `stop`; False if they do not fit or belong to another cache."""
        with self._lock:
            is_free = stop <= self.room and start == self.filled
            self.filled = stop if is_free else self.filled
            return is_free


@dataclass
class OnnxCache:
    """Keys and values of the tokens so far.

    Attributes:
        storage: where they are. Several caches may share one, and then they agree on the positions that both have.
        length: the number of cached positions; of the longest row, where rows differ.
    """

    storage: Storage
    length: int

    @property
    def values(self) -> dict[str, Any]:
        """ONNX Runtime's tensors by input name, on the session's device; they may have room for more positions."""
        return self.storage.values


class CacheSlots:
    """The cache slots of a graph: allocates storages and binds them to a run.

    Args:
        session: the graph's session.
        device: "cuda" or "cpu".
        in_place: whether a run adds to the storage that it reads.

    Attributes:
        layout: equal in graphs that read each other's storages: device, whether in place, and the cache inputs.
    """

    def __init__(self, session, device: str, in_place: bool):
        self.device = device
        self.in_place = in_place
        self._inputs = {each.name: each for each in session.get_inputs() if each.name.startswith(PAST)}
        inputs = [(each.name, each.type, each.shape[1], each.shape[3]) for each in self._inputs.values()]
        self.layout = device, in_place, *inputs
        self._join_sessions: dict[str, Any] = {}

    @property
    def names(self) -> list[str]:
        """Names of the cache inputs, in the order in which `bind_present` binds the outputs."""
        return list(self._inputs)

    def allocated(self, batch: int, room: int) -> Storage:
        """A storage of zeros: kernels may multiply what they do not use by 0, and NaN would stay NaN.

        On the CPU, memory that is not written takes no place.
        """
        return self.storage({name: self._zeros(name, batch, room) for name in self._inputs})

    def storage(self, values: dict[str, Any], filled: int = 0) -> Storage:
        """A storage of this graph's layout."""
        return Storage(values, self.layout, filled)

    def with_room(self, cache: OnnxCache, length: int) -> OnnxCache:
        """The same positions where `length` fit and may be added: the same storage, or a copy of twice its size.

        A cache that is not the newest on its storage gets a copy: another has written there, or is about to.
        """
        storage = cache.storage
        if storage.claim(cache.length, length):
            return cache
        room = storage.room if length <= storage.room else room_for(length, storage.room)
        values = {name: self._copied(name, value, cache.length, room) for name, value in storage.values.items()}
        return OnnxCache(self.storage(values, length), cache.length)

    def bind_past(self, binding, cache: OnnxCache, row: int | None = None) -> None:
        """Bind the cache inputs; `row` binds one row of the storage alone."""
        for name, value in cache.values.items():
            length = value.shape()[2] if self.in_place else cache.length
            if row is None and length == value.shape()[2]:
                binding.bind_ortvalue_input(name, value)
            else:
                binding.bind_input(name, self.device, 0, *self._part(name, value, length, row))

    def bind_present(self, binding, target: Storage | None, length: int, row: int | None = None) -> None:
        """Bind the cache outputs to a storage; None lets ONNX Runtime allocate them."""
        for name in self._inputs:
            output = name.replace(PAST, PRESENT)
            if target is None:
                binding.bind_output(output, self.device)
                continue
            value = target.values[name]
            length = value.shape()[2] if self.in_place else length
            binding.bind_output(output, self.device, 0, *self._part(name, value, length, row))

    def _part(self, name: str, value, length: int, row: int | None) -> tuple[Any, list[int], int]:
        """Element type, shape and address of the first positions of a tensor's memory, or of one row of it."""
        batch, heads, room, size = value.shape()
        kind = self._element(name)
        item = 2 if kind == _BFLOAT16 else np.dtype(kind).itemsize
        start = 0 if row is None else row * heads * room * size * item
        return kind, [batch if row is None else 1, heads, length, size], value.data_ptr() + start

    def _element(self, name: str) -> Any:
        return _NUMPY.get(self._inputs[name].type, _BFLOAT16)

    def _host_array(self, name: str, batch: int, room: int) -> np.ndarray:
        """Zeros for a tensor; bfloat16 as the integers of the same size."""
        kind, shape = self._element(name), self._inputs[name].shape
        return np.zeros((batch, shape[1], room, shape[3]), np.uint16 if kind == _BFLOAT16 else kind)

    def _host_value(self, name: str, array: np.ndarray):
        """A tensor over the memory of an array."""
        from onnxruntime import OrtValue

        if self._element(name) == _BFLOAT16:
            return OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
        return OrtValue.ortvalue_from_numpy(array)

    def _zeros(self, name: str, batch: int, room: int):
        value = self._host_value(name, self._host_array(name, batch, room))
        if self.device == "cpu":
            return value
        return self._lengthened(name, self._host_value(name, self._host_array(name, batch, 0)), room)

    def _copied(self, name: str, value, length: int, room: int):
        """The first positions of a tensor, in a new one with room for others."""
        batch, _, old_room, _ = value.shape()
        if self.device != "cpu":
            return self._lengthened(name, value, room - old_room)
        array = self._host_array(name, batch, room)
        array[:, :, :length] = value.numpy()[:, :, :length]
        return self._host_value(name, array)

    def _lengthened(self, name: str, value, extra: int):
        """A copy of a tensor on the device, with zeros for more positions; ONNX Runtime itself has no such function."""
        join = self._joins(self._inputs[name].type)
        # A binding of older releases does not keep it alive.
        zeros = self._host_value(name, self._host_array(name, value.shape()[0], extra))
        binding = join.io_binding()
        binding.bind_ortvalue_input("first", value)
        binding.bind_ortvalue_input("second", zeros)
        binding.bind_output("y", self.device)
        join.run_with_iobinding(binding)
        return binding.get_outputs()[0]

    def _joins(self, kind: str):
        from onnxruntime import InferenceSession

        if kind not in self._join_sessions:
            graph = small_graph("Concat", ["first", "second"], kind, axis=2)
            self._join_sessions[kind] = InferenceSession(graph, quiet_options(), providers=PROVIDERS[self.device])
        return self._join_sessions[kind]


def room_for(length: int, room: int = 0) -> int:
    """How many positions to allocate room for, where `length` are needed and `room` were not enough."""
    return max(length + _SPARE_POSITIONS, 2 * room)
