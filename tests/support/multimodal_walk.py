"""The walk of multimodal families: what `family_walk` checks, with images or sounds in the prompts.

A family has three kinds of prompts: one image; a row with an image beside a row of text alone; two images in a row.
Cached decoding is `generate`, because families put the positions and types of later tokens there.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto import modeling_auto

import loopexport
from loopexport.base import families
from support.compare import TOLERANCE
from support.multimodal_configs import FIRST_SPECIAL_TOKEN, VOCABULARY, tiny_multimodal_config
from support.multimodal_inputs import Medium, behind_padding, find_medium, for_longer, key_of_medium, prompt
from support.walk_checks import (
    Outcome,
    TextCase,
    changed_between_layers,
    check_exact,
    one_line,
    relative,
    try_spans,
    why_base_cannot_decode,
)
from support.walk_configs import save_base

IMAGE_CLASSES = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
OTHER_CLASSES = getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})  # transformers 5
MULTIMODAL_FAMILIES = {**OTHER_CLASSES, **IMAGE_CLASSES}
ROWS = ([1], [1, 0], [2], [0])  # how many images the rows of a prompt have
NEW_TOKENS = 3
SEEDS = range(1, 9)


class MultimodalCase(TextCase):
    """How models of one multimodal family are loaded, prompted and decoded.

    Attributes:
        auto: their Auto class.
        medium: what they take beside text.
        rows: the prompts, as numbers of images in each row.
        seed: the seed of their text.
    """

    seed = 1

    def __init__(self, auto, medium: Medium, model, rows=ROWS):
        self.auto = auto
        self.medium = medium
        self.rows = rows
        self._model = model

    def prompts(self) -> list[dict]:
        return [prompt(self._model, self.medium, rows, seed=self.seed) for rows in self.rows]

    @torch.no_grad()
    def decoded(self, model, prompt: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of `generate`, and the same from one forward of all tokens."""
        special = [2, *range(FIRST_SPECIAL_TOKEN, VOCABULARY)]  # no end, no placeholder
        output = model.generate(
            **prompt,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            suppress_tokens=special,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        longer = for_longer(self._model, self.medium, prompt, output.sequences)
        return torch.stack(output.logits, dim=1), self.full(model, longer)[:, -NEW_TOKENS - 1 : -1]

    def padded(self, model) -> tuple[torch.Tensor, torch.Tensor]:
        short = self.prompts()[0]
        padded = self.full(model, behind_padding(self._model, self.medium, short))
        return padded[:, -short["input_ids"].shape[1] :], self.full(model, short)

    def check_medium_matters(self, model) -> None:
        """ValueError if another image gives the same logits."""
        first = self.prompts()[0]
        key = key_of_medium(first)
        other = {**first, key: first[key].flip(-1)}
        if relative(self.full(model, other), self.full(model, first)) < 1e-5:
            raise ValueError(f"its tiny model gives the same logits for any {self.medium.kind}")


def walk_multimodal(family: str, directory: Path) -> Outcome:
    """Try one multimodal family; see `family_walk.walk`."""
    try:
        refusal = _why_refused(family, CONFIG_MAPPING[family]())
        if refusal:
            return Outcome("refused", refusal)
        config = tiny_multimodal_config(family)
        auto = _auto_class(family)
        base = save_base(config, directory / "base", auto)
        TextAlone(auto).load(base)
    except Exception as error:  # a class of transformers may raise anything at a size that it was not made for
        return Outcome("untried", one_line(error))
    try:
        case = _case(auto, base)
    except Exception as error:  # as above
        return _walk_text_alone(base, directory, auto, one_line(error))
    try:
        outcome = try_spans(base, directory, case)
        _check_special_spans(base, directory, case)
    except Exception:  # our bug, unless the base itself fails too
        reason = why_base_cannot_decode(base, case)
        if reason:
            return Outcome("untried", reason)
        raise
    return outcome


def _check_special_spans(base: Path, directory: Path, case: MultimodalCase) -> None:
    """Loop the layers that get more than the hidden states of the layer before, or see that they are refused."""
    model = case.load(base)
    changed = changed_between_layers(case, model)
    crossed = getattr(model.config.get_text_config(decoder=True), "cross_attention_layers", None) or []
    spans = [(changed[0] - 1, changed[-1] + 1)] if changed else []
    for span in [*spans, *((layer - 1, layer + 1) for layer in crossed[:1])]:
        try:
            check_exact(base, span, directory, case=case)
            print(f"span {span}: exact")
        except ValueError as refusal:
            print(f"span {span}: refused: {one_line(refusal)}")


def _why_refused(family: str, config) -> str:
    """Why the family is refused for its `config.json` alone; empty if it is not."""
    try:
        families.check_family({**config.to_dict(), "architectures": [MULTIMODAL_FAMILIES[family]]})
    except loopexport.LoopExportError as error:
        return one_line(error)
    return ""


def reads(family: str) -> str:
    """What a family reads beside text, one of `families.MEDIA`; images, if it reads both."""
    has_vision = "vision_config" in getattr(CONFIG_MAPPING[family], "sub_configs", {})
    return "images" if family in IMAGE_CLASSES or has_vision else "sound"


def _auto_class(family: str):
    if family in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and MULTIMODAL_FAMILIES[family].endswith(
        "ForCausalLM"
    ):
        return AutoModelForCausalLM
    return AutoModelForImageTextToText if family in IMAGE_CLASSES else transformers.AutoModelForMultimodalLM


@torch.no_grad()
def _case(auto, base: Path) -> MultimodalCase:
    """The case of a family. ValueError, or what its model raises, if there is no prompt that it takes."""
    model = TextAlone(auto).load(base)
    medium = find_medium(model)
    case = MultimodalCase(auto, medium, model)
    case.check_medium_matters(model)
    try:
        case.full(model, case.prompts()[-1])
    except (TypeError, ValueError):  # Idefics and BLIP-2 take no prompts without an image
        case.rows = ROWS[:-1]
    case.seed = next((seed for seed in SEEDS if _rounds_little(case, model, seed)), SEEDS[0])
    return case


def _rounds_little(case: MultimodalCase, model, seed: int) -> bool:
    """Whether the base's own decoding differs from its full forward by less than half of what a loop may."""
    case.seed = seed
    try:
        return max(relative(*case.decoded(model, each)) for each in case.prompts()) < TOLERANCE / 2
    except Exception:  # the base cannot decode at all, which the walk finds and says
        return False


class TextAlone(TextCase):
    """Multimodal models with prompts of text."""

    def __init__(self, auto):
        self.auto = auto


def _walk_text_alone(base: Path, directory: Path, auto, reason: str) -> Outcome:
    """Try a family for which there is no prompt with an image: it stays untried, but an export must not be wrong."""
    case = TextAlone(auto)
    failure = why_base_cannot_decode(base, case)
    if failure:
        return Outcome("untried", failure)
    outcome = try_spans(base, directory, case)
    if outcome.status != "works":
        return outcome
    return Outcome("untried", f"exact with text alone; no prompt with more than text for its tiny model: {reason}")
