"""What `verify` runs a model on: random tokens, after an image if the base reads images."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopexport.base.families import is_multimodal
from loopexport.errors import one_line
from loopexport.export.directory import Export

if TYPE_CHECKING:
    import torch

NUM_TOKENS = 24
# Lengths of the forwards through one cache: a prefill and decode steps; the same with a longer chunk between them.
STEPS = (16, *[1] * 8)
CHUNKS = (12, 1, 1, 9, 1)
# The same after a prompt with an image, which is the prefill. A cache takes an image in one piece.
STEPS_AFTER_IMAGE = (1,) * 8
CHUNKS_AFTER_IMAGE = (1, 1, 5, 1)

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
QUESTION = "What is in this image?"
SIDE = 64  # pixels; processors resize the image
PACKAGES = {"pillow": "PIL", "torchvision": "torchvision"}
MAX_REASON_CHARS = 200


class _NoImageError(Exception):
    """There is no prompt with an image, for a reason that we know."""


@dataclass(frozen=True)
class Probe:
    """The inputs of a forward, which can be split into chunks.

    Attributes:
        tokens: token ids, `(batch, seq)`.
        by_token: other inputs with one entry for each token, such as `token_type_ids`, `(batch, seq)`.
        images: inputs that belong to the whole prompt, such as `pixel_values`.
        prompt: number of tokens of the prompt with the image; 0 if there is none.
        reason: why a multimodal base gets text alone; else empty.
    """

    tokens: torch.Tensor
    by_token: dict[str, torch.Tensor] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    prompt: int = 0
    reason: str = ""

    @property
    def whole(self) -> tuple[int, ...]:
        """One forward over all tokens, as lengths."""
        return (self.tokens.shape[1],)

    @property
    def steps(self) -> tuple[int, ...]:
        """Lengths of a prefill and decode steps."""
        return (self.prompt, *STEPS_AFTER_IMAGE) if self.prompt else STEPS

    @property
    def chunks(self) -> tuple[int, ...]:
        """Lengths of a prefill, decode steps and a longer chunk."""
        return (self.prompt, *CHUNKS_AFTER_IMAGE) if self.prompt else CHUNKS

    def split(self, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
        """The inputs of forwards of these lengths through one cache; the first one gets the images."""
        by_token = {"input_ids": self.tokens, **self.by_token}
        pieces = {name: each.split(lengths, dim=1) for name, each in by_token.items()}
        chunks: list[dict[str, Any]] = [
            {name: each[number] for name, each in pieces.items()} for number in range(len(lengths))
        ]
        return [{**chunks[0], **self.images}, *chunks[1:]]

    def with_other_image(self) -> Probe:
        """The same with the negative of the image."""
        images = {name: -each if name.startswith("pixel_values") else each for name, each in self.images.items()}
        return replace(self, images=images)


def full_logits(model, probe: Probe) -> torch.Tensor:
    """The logits of one forward without a cache, `(batch, seq, vocab)`."""
    [inputs] = probe.split(probe.whole)
    return model(**inputs, use_cache=False).logits


def cached_logits(model, probe: Probe, lengths: tuple[int, ...]) -> torch.Tensor:
    """The logits of forwards of these lengths through one cache, `(batch, seq, vocab)`."""
    import torch

    from loopexport.templates.looped_arguments import find_cache_argument

    argument = find_cache_argument(model)
    name = "past_key_values" if argument is None else argument[0]  # transformers renames it from 5.24 on
    cache: dict[str, Any] = {}
    logits: list[torch.Tensor] = []
    positions = torch.arange(sum(lengths)).split(lengths)
    takes_positions = "cache_position" in inspect.signature(model.forward).parameters  # transformers 4
    for inputs, position in zip(probe.split(lengths), positions, strict=True):
        place = {"cache_position": position} if takes_positions else {}  # without it, Qwen 2.5 VL starts at 0 again
        output = model(**inputs, **place, **cache, use_cache=True)
        logits.append(output.logits)
        cache = {name: output[name]} if len(lengths) > 1 else {}
    return torch.cat(logits, dim=1)


def make_probe(export: Export, config) -> Probe:
    """A prompt with an image and random tokens, or random tokens alone.

    Args:
        export: the export, with the processor's files.
        config: the base's config, as transformers loads it.
    """
    if not is_multimodal(export.base.config):
        return text_probe(config)
    try:
        return _image_probe(_processed_prompt(export.root), config)
    except Exception as error:  # processors of strangers may raise anything, and may need libraries that are not here
        return replace(text_probe(config), reason=_why_no_image(error))


def text_probe(config) -> Probe:
    """Random tokens, `(2, NUM_TOKENS)`.

    Args:
        config: the model's config, as transformers loads it.
    """
    return Probe(_random_tokens(config, (2, NUM_TOKENS)))


def _random_tokens(config, shape: tuple[int, int]) -> torch.Tensor:
    """Random token ids. In a multimodal model none stands for an image, a video or sound that is not there."""
    import torch

    text_config = config.get_text_config(decoder=True)
    taken = _special_tokens(config) if text_config is not config else set()
    allowed = torch.tensor([token for token in range(text_config.vocab_size) if token not in taken])
    return allowed[torch.randint(len(allowed), shape, generator=torch.Generator().manual_seed(0))]


def _special_tokens(config) -> set[int]:
    """Token ids with a name in the config."""
    named = {name: each for name, each in config.to_dict().items() if name.endswith(("_token_id", "_token_index"))}
    return {each for each in named.values() if isinstance(each, int)}


def _image_probe(prompt: dict[str, Any], config) -> Probe:
    """A processed prompt and random tokens after it.

    Raises:
        _NoImageError: the processor made no pixels of the image.
    """
    import torch

    tokens = prompt.pop("input_ids")
    prompt.pop("attention_mask", None)  # there is no padding
    if not any(name.startswith("pixel_values") for name in prompt):
        raise _NoImageError(f"its processor gives {', '.join(prompt) or 'nothing'} for an image, and no pixel_values")
    more = _random_tokens(config, (1, sum(STEPS_AFTER_IMAGE)))
    by_token = {name: each for name, each in prompt.items() if getattr(each, "shape", None) == tokens.shape}
    return Probe(
        torch.cat([tokens, more], dim=1),
        {name: torch.cat([each, each.new_zeros(more.shape)], dim=1) for name, each in by_token.items()},
        {name: each for name, each in prompt.items() if name not in by_token},
        prompt=tokens.shape[1],
    )


def _processed_prompt(root: Path) -> dict[str, Any]:
    """What the export's processor makes of a question about an image.

    Raises:
        _NoImageError: the export has no processor.
    """
    if not any((root / name).exists() for name in PROCESSOR_FILES):
        raise _NoImageError(f"the export has none of {', '.join(PROCESSOR_FILES)}")
    processor = _processor_of(root)
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": _picture()}, {"type": "text", "text": QUESTION}]
        chat = [{"role": "user", "content": content}]
        return dict(
            processor.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        )
    token = getattr(processor, "boi_token", None) or processor.image_token  # Gemma 3 writes the first one
    return dict(processor(text=f"{token} {QUESTION}", images=[_picture()], return_tensors="pt"))


def _processor_of(root: Path) -> Any:
    """The processor of an export, without code of the export."""
    from transformers import AutoProcessor
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of the type in the config, and does not use it
    try:
        return AutoProcessor.from_pretrained(root, trust_remote_code=False)
    finally:
        logging.set_verbosity(verbosity)


def _picture():
    """A picture in which no two places are alike."""
    from PIL import Image

    pixels = ((3 * x * x + 5 * y * c + 7 * c) % 256 for y in range(SIDE) for x in range(SIDE) for c in (1, 2, 3))
    return Image.frombytes("RGB", (SIDE, SIDE), bytes(pixels))


def _why_no_image(error: Exception) -> str:
    """The error, and which packages for images are not installed."""
    absent = [package for package, module in PACKAGES.items() if find_spec(module) is None]
    if isinstance(error, _NoImageError) or not absent:
        return one_line(error, MAX_REASON_CHARS)
    return f"{one_line(error, MAX_REASON_CHARS)}; perhaps for lack of a package: `pip install {' '.join(absent)}`"
