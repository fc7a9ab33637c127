"""How the weights of an ONNX export are quantised: the choices, their words, and the names of files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

BITS = {"int4": 4, "int8": 8}
BLOCK_SIZES = (16, 32, 64, 128, 256)  # that ONNX Runtime's MatMulNBits takes
HEAD_BITS = 8  # 4 bits in the head cost as much as in all layers together


@dataclass(frozen=True)
class Quantisation:
    """How linear layers are quantised.

    Attributes:
        bits: 4 or 8.
        block_size: inputs of one output that share a scale.
        zero_points: whether each block has a zero point; else its codes are symmetric.
        head: whether the head is quantised, to 8 bits, and with it the embedding that it is tied to.
        mixed: whether the layers that lose most have 8 bits in place of 4.
        kept: whether these are the codes of a base that was quantised already; then the rest is that of most of them.
    """

    bits: int
    block_size: int = 32
    zero_points: bool = True
    head: bool = False
    mixed: bool = False
    kept: bool = False

    def __post_init__(self):
        if self.bits not in BITS.values() or self.block_size not in BLOCK_SIZES:
            raise ValueError(f"{self} is not a quantisation of LoopExport")
        if not all(type(value) is bool for value in (self.zero_points, self.head, self.mixed, self.kept)):
            raise TypeError(f"{self} is not a quantisation of LoopExport")

    @property
    def dtype(self) -> str:
        """The value of `--dtype`: int4 or int8."""
        return f"int{self.bits}"

    @property
    def words(self) -> str:
        """In a few words, such as `int4 in blocks of 32 with zero points, the head in int8`."""
        parts = [f"{self.dtype} in blocks of {self.block_size}{' with zero points' if self.zero_points else ''}"]
        parts += ["sensitive layers in int8"] if self.mixed else []
        parts += ["the head in int8"] if self.head else []
        parts += ["the codes of the base as they are"] if self.kept else []
        return ", ".join(parts)

    @property
    def options(self) -> str:
        """The options of `loopexport onnx` beyond `--dtype`, each with a space before it."""
        if self.kept:
            return ""
        default = Quantisation(self.bits)
        parts = [f" --block-size {self.block_size}"] if self.block_size != default.block_size else []
        parts += [" --symmetric"] if not self.zero_points else []
        parts += [" --quantise-head"] if self.head else []
        parts += [" --mixed"] if self.mixed else []
        return "".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def read_quantisation(values: Mapping[str, Any] | None) -> Quantisation | None:
    """The quantisation that `to_dict` wrote; None for None.

    Raises:
        TypeError, ValueError: it is not one.
    """
    return None if values is None else Quantisation(**values)


@dataclass(frozen=True)
class Divergence:
    """How far a quantised model is from the plain one, over the tokens of a text.

    Attributes:
        nats: mean Kullback-Leibler divergence of the next token, quantised from plain, in nats a token.
        agreement: fraction of tokens after which both hold the same next token for the likeliest.
    """

    nats: float
    agreement: float


@dataclass(frozen=True)
class Cost:
    """What quantising costs, on a text.

    Attributes:
        text: the name of the text.
        tokens: number of tokens.
        base: of the base, K = 1.
        loop: of the loop of the graph.
    """

    text: str
    tokens: int
    base: Divergence
    loop: Divergence

    def words(self, text: str) -> str:
        """In a sentence; `text` is the name of the text, escaped for where the sentence stands."""
        return (
            f"on {self.tokens:,} tokens of {text}: KL {self.loop.nats:.3g} nats a token, the same likeliest token "
            f"after {self.loop.agreement:.1%} (the base: {self.base.nats:.3g}, {self.base.agreement:.1%})"
        )


def read_cost(values: Mapping[str, Any] | None) -> Cost | None:
    """The cost that `asdict` made a mapping of; None for None.

    Raises:
        TypeError, ValueError: it is not one.
    """
    if values is None:
        return None
    cost = Cost(**{**values, "base": Divergence(**values["base"]), "loop": Divergence(**values["loop"])})
    numbers = (cost.base.nats, cost.base.agreement, cost.loop.nats, cost.loop.agreement)
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise TypeError(f"{values!r} is not the cost of a quantisation")
    if type(cost.tokens) is not int or not (isinstance(cost.text, str) and cost.text.isprintable()):
        raise TypeError(f"{values!r} is not the cost of a quantisation")
    return cost
