"""The model card of an export, a pure function of `CardFacts`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from loopexport.base.checkpoint import Origin
from loopexport.base.families import is_multimodal
from loopexport.base.licence import licence_of
from loopexport.base.tokenizer import Home
from loopexport.loop.cost import Cost
from loopexport.loop.presets import STATUSES, Preset
from loopexport.loop.spec import LoopSpec
from loopexport.loop.wording import describe_applied, describe_unlooped_steps, formula
from loopexport.templates.looped_spec import as_json

from .card_loop import decode_meaning, kv_meaning, legend, loop_rows
from .card_results import MODEL_INDEX, model_index, results_section
from .card_usage import (
    mlx_section,
    multimodal_section,
    on_the_hub,
    onnx_section,
    pipeline_tag,
    text_section,
    vllm_section,
)
from .foreign_text import markdown_code, markdown_text, python_literal
from .manifest import HUB_ID, OnnxRecord
from .results_file import Measured

# Metadata that the card copies from the base's card.
INHERITED = ("license", "license_name", "license_link", "language")

MADE_WITH = "Made with LoopExport"  # every card says so, those of earlier versions too: do not change it

# `published_card` finds this text in cards of earlier versions too: do not change it.
NO_WEIGHTS = """
> **There are no weights in this directory**, and it cannot be loaded. It was converted with `--weights none`;
> `loopexport push` completes it on the Hub with the base's own weights.
"""


@dataclass(frozen=True)
class CardFacts:
    """Everything that the card is made from.

    Attributes:
        base: where the base came from.
        base_card: the base's own card, for its licence and language; may be empty.
        model_type: the base's family.
        num_layers: the base's number of decoder layers.
        spec: the loop.
        cost: the cost of the loop.
        published: the preset that was measured with this loop on this model; None if there is none.
        quantisation: the base's quantisation method; None for plain weights.
        tokenizer: where the tokenizer is.
        has_weights: whether the export has its weights.
        trained: whether the weights were trained since the conversion.
        onnx: the ONNX files of the export, by name.
        config: the base's config.
        measured: the results of `loopexport compare --save`.
        processor: whether the export has the processor of a multimodal model.
        text_only: whether the base was multimodal, and only its language model is here.
        mlx: whether mlx-lm loads the export.
    """

    base: Origin
    base_card: str
    model_type: str
    num_layers: int
    spec: LoopSpec
    cost: Cost
    published: Preset | None = None
    quantisation: str | None = None
    tokenizer: Home = "export"
    has_weights: bool = True
    trained: bool = False
    onnx: Mapping[str, OnnxRecord] = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    measured: Measured = field(default_factory=Measured)
    processor: bool = True
    text_only: bool = False
    mlx: bool = False

    @property
    def is_multimodal(self) -> bool:
        """Whether the model reads more than text."""
        return is_multimodal(self.config)


def make_card(facts: CardFacts) -> str:
    """The README.md of an export: metadata for the Hub, the loop, its cost, and how to load the model."""
    inherited = read_metadata(facts.base_card)
    return _metadata(facts, inherited) + _BODY.format(
        name=markdown_text(facts.base.name.rsplit("/", 1)[-1]),
        title="looped and trained" if facts.trained else "looped",
        no_weights="" if facts.has_weights else NO_WEIGHTS,
        intro=_intro(facts),
        quantised=_quantised(facts.quantisation),
        results=_results(facts.published),
        measured=results_section(facts.measured),
        use="\n".join(filter(None, _use(facts))),
        made_with=MADE_WITH,
        licence=_licence_text(inherited, facts.trained),
        **_table(facts),
    )


def published_card(card: str, repo_id: str) -> str:
    """The card for the Hub: without the warning about missing weights, and with `repo_id` in the examples."""
    return on_the_hub(card.replace(NO_WEIGHTS, ""), repo_id)


def merge_card(ours: str, theirs: str) -> str:
    """Merge our card into `theirs`, which was edited on the Hub.

    Their text wins, unless it is empty. Their metadata wins too; keys and tags that only ours has are added.
    """
    known, edited = read_metadata(ours), read_metadata(theirs)
    body = _body(theirs) if _body(theirs).strip() else _body(ours)
    tags = dict.fromkeys([*_tags(edited), *_tags(known)])
    merged = {**known, **edited, "tags": list(tags)}
    return theirs if merged == edited and body == _body(theirs) else _front_matter(merged) + body


def _tags(metadata: dict) -> list:
    tags = metadata.get("tags")
    return tags if isinstance(tags, list) else []


def with_licence(card: str, base_card: str) -> str:
    """`card` with the licence and the language of `base_card`, where it has none of its own."""
    own, known = read_metadata(card), read_metadata(base_card)
    added = {key: known[key] for key in INHERITED if key in known and key not in own}
    if "license" in own:  # its details belong to another licence
        added = {key: value for key, value in added.items() if not key.startswith("license")}
    return _front_matter({**own, **added}) + _body(card) if added else card


def read_metadata(card: str) -> dict:
    """The metadata at the head of a model card; empty if there is none."""
    from loopexport.files.yaml_text import CardLoader, ResultsLoader, load_yaml

    match = _HEAD.match(card)
    try:
        values = load_yaml(match[1], CardLoader) if match else {}
    except ValueError:
        return {}
    if not match or not isinstance(values, dict):
        return {}
    if MODEL_INDEX in values:
        values[MODEL_INDEX] = load_yaml(match[1], ResultsLoader)[MODEL_INDEX]
    return values


def _table(facts: CardFacts) -> dict[str, object]:
    """The values for the table and the formula."""
    spec = facts.spec
    return {
        "model_type": markdown_code(facts.model_type),
        "loop": loop_rows(spec, facts.num_layers),
        "num_layers": facts.num_layers,
        "kv": spec.kv,
        "kv_meaning": kv_meaning(spec),
        "decode": spec.decode,
        "decode_meaning": decode_meaning(spec),
        "evaluations": facts.cost.layer_evaluations,
        "multiplier": f"{facts.cost.multiplier:.2f}",
        "unlooped_steps": describe_unlooped_steps(spec),
        "legend": legend(spec),
        "formula": formula(spec),
    }


def _use(facts: CardFacts) -> list[str]:
    """How to load the model: a section for each runtime, empty for a runtime that cannot."""
    return [
        _transformers(facts),
        onnx_section(facts.onnx, facts.num_layers),
        "" if facts.is_multimodal else vllm_section(facts.model_type, facts.spec, facts.config, facts.quantisation),
        mlx_section(as_json(facts.spec.steps)) if facts.mlx else "",
    ]


def _transformers(facts: CardFacts) -> str:
    if facts.is_multimodal and facts.processor:
        return multimodal_section(facts.spec, facts.config, facts.trained)
    section = text_section(facts.spec, _tokenizer(facts), facts.trained, facts.config)
    return f"{_NO_PROCESSOR}\n{section}" if facts.is_multimodal else section


def _tokenizer(facts: CardFacts) -> str | None:
    """The Python expression to load the tokenizer from; None if there is none."""
    if facts.tokenizer == "export":
        return "path"
    is_lost = facts.tokenizer == "nowhere" and facts.base.revision is None
    return None if is_lost else python_literal(facts.base.name)


def _quantised(method: str | None) -> str:
    if not method:
        return ""
    return f" The base is quantised with {markdown_text(method)}: loading needs the same libraries as the base."


def _results(published: Preset | None) -> str:
    """The published results for this model and loop."""
    if published is None:
        return "No measured gain is known for this model and loop."
    lines = "\n".join(f"- {result}" for result in published.results)
    return f"Published for this model and loop, {published.status} ({STATUSES[published.status]}):\n\n{lines}"


_HEAD = re.compile(r"\ufeff?\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)


def _body(card: str) -> str:
    """The text of a card, without its metadata."""
    match = _HEAD.match(card)
    return card[match.end() :] if match else card


def _front_matter(values: dict) -> str:
    import yaml

    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n"


def _licence_text(metadata: dict, trained: bool) -> str:
    licence = licence_of(metadata)
    if licence is None:
        return ""
    built_with = f"**{licence.built_with}.** " if licence.built_with else ""
    weights = "the weights were trained" if trained else "the weights are unchanged"
    return (
        f"\n## Licence\n\n{built_with}{licence.notice_text.rstrip('.')}.\n\nThe base's files were modified: "
        f"`config.json` and this card are new, modeling code was added, {weights}.\n"
    )


def _metadata(facts: CardFacts, inherited: dict) -> str:
    values: dict = {key: inherited[key] for key in INHERITED if _is_plain(inherited.get(key))}
    if _is_on_hub(facts):  # the name of a local directory is not a Hub id
        values["base_model"] = facts.base.name
        values["base_model_relation"] = "finetune"  # the Hub has no word for the same weights with other code
    values |= {
        "library_name": "transformers",
        "pipeline_tag": pipeline_tag(facts.config, inherited),
        "tags": ["custom_code", "looped", "loopexport", *(["onnx"] if facts.onnx else [])],
    }
    return _front_matter(values | model_index(facts.base.name, facts.measured.own))


def _is_plain(value) -> bool:
    """Whether a value of the base's metadata is a line of text, or a list of such lines."""
    lines = value if isinstance(value, list) else [value]
    return all(isinstance(line, str) and line.isprintable() for line in lines)


def _is_on_hub(facts: CardFacts) -> bool:
    """Whether the base has a Hub id: its commit is known, or somebody gave the id for an adopted export."""
    is_known = facts.base.revision is not None or (facts.trained and "/" in facts.base.name)
    return is_known and HUB_ID.fullmatch(facts.base.name) is not None


def _intro(facts: CardFacts) -> str:
    """Where the model comes from, what is looped, and what its weights are."""
    text = _TRAINED_INTRO if facts.trained else _INTRO
    values = _table(facts)
    applied = describe_applied(facts.spec, facts.num_layers, " are" if facts.trained else "")
    intro = text.format(base=_base_link(facts), applied=applied)
    more = _LANGUAGE_MODEL.format(**values) if facts.is_multimodal else _TEXT_ONLY if facts.text_only else ""
    return f"{intro}\n\n{more}" if more else intro


def _base_link(facts: CardFacts) -> str:
    base = facts.base
    if not _is_on_hub(facts):
        # For an adopted export, a name without an owner may be a directory or an old Hub id such as gpt2.
        return markdown_code(base.name) + ("" if facts.trained else " (a local checkpoint)")
    link = f"[{markdown_text(base.name)}](https://huggingface.co/{base.name})"
    return link if base.revision is None else f"{link} at commit {markdown_code(base.revision)}"


_INTRO = """\
This is {base}, with {applied}, without any training
([Training-Free Looped Transformers](https://arxiv.org/abs/2605.23872)). The weights are the base model's, byte for
byte, and are stored once; only the forward pass differs."""

_TRAINED_INTRO = """\
This model was made from {base}: {applied}
([Training-Free Looped Transformers](https://arxiv.org/abs/2605.23872)). **Its weights were trained since, and are not
the base model's.** They are stored once."""

_LANGUAGE_MODEL = """\
The model reads more than text. The loop runs in its language model alone: the span counts the {num_layers} decoder
layers there. Its other parts run once, as in the base."""

_TEXT_ONLY = """\
The base reads more than text. Only its language model is here; its other parts were left out."""

_NO_PROCESSOR = "The base's directory had no processor: AutoProcessor will not load from here. Text alone works:\n"

_BODY = """
# {name}, {title}
{no_weights}
{intro}{quantised}

**Gains are not guaranteed.** Published gains are a few points, on some tasks and some models. Other spans, tasks and
models lost, and models under 3B parameters gained nothing in reproductions. Compare this model with its base on your
own task before you rely on it. {results}

| | |
| --- | --- |
| family | {model_type} |
{loop}
| K/V policy | `{kv}`: {kv_meaning} |
| decoding | `{decode}`: {decode_meaning} |
| cost | {evaluations} layer evaluations per token instead of {num_layers}: {multiplier}x{unlooped_steps} |

{legend}

```
{formula}
```

{measured}
## Use

{use}
{made_with}. `loopexport.json` records the base and the digests of the files; `base/` has the originals of the
files that were changed.
{licence}"""
