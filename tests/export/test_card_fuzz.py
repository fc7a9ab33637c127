"""Whatever a stranger's names and words are, the card has the structure, the links and the code of an ordinary one.

By default a fixed sample is drawn; LOOPEXPORT_FUZZ_EXAMPLES=20000 draws that many at random.
"""

from __future__ import annotations

import ast
import json
import os
import re

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from loopexport.base.checkpoint import Origin
from loopexport.export.card import INHERITED, CardFacts, make_card, published_card, read_metadata
from loopexport.export.foreign_text import javascript_literal, markdown_code, markdown_text, python_literal
from loopexport.export.manifest import HUB_ID, OnnxRecord
from loopexport.export.results_file import MAX_CHARS
from loopexport.loop.cost import Cost
from loopexport.loop.spec import make_spec
from loopexport.templates.looped_vllm_limits import VLLM_QUANTISED
from support.measured import TASK, made_measured, made_result

EXAMPLES = os.environ.get("LOOPEXPORT_FUZZ_EXAMPLES")
SETTINGS = settings(
    max_examples=int(EXAMPLES or 60),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
SHA = "0123456789abcdef0123456789abcdef01234567"
COST = Cost(24, 16, 1_500_000, 1_000_000, 3_000_000, 2_000_000, 65_536, 65_536)
SPEC, OTHER = make_spec(span="6:10", steps=3), make_spec(span="6:10", steps=4)
PIECES = [
    "\n", "\n\n", "\r", "\t", " ", "`", "``", "```", "~~~", "|", "\\", "\\|", "*", "_", "__", "#", "## Install", "- ",
    "> ", "1. ", "<img src=x onerror=alert(1)>", "</code>", "<!--", "[a](http://evil.example)", "![](x)",
    "[x]: http://evil.example", "]", "(", ")", "https://evil.example",
    "www.evil.example", "me@evil.example", "&lt;", "&#96;", "---", "\n---\n",
    "===", '"', "'", '"""', "'''", '" + __import__("os").system("id") + "', "${x}", "{name}", "{", "}", "%s", "//", "/",
    "../", "\0", "\x1b[2J", "\u202e", "\u2028", "\x85", "\ud800", "\ufeff", "é", "模型", "model", "_x_", "a_b", "v0.1",
    ": ", "!!python", "&a", "*a", "$(id)", "`id`", "=", "null", "~", "yes", "\u00a0", "portable", "gptq", "x" * 300,
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=6).map("".join)
VALID = TEXTS.map(lambda text: text.encode(errors="replace").decode())
HUB_IDS = st.from_regex(HUB_ID, fullmatch=True)
METADATA = st.dictionaries(
    st.sampled_from(INHERITED), VALID | st.lists(VALID, max_size=3) | st.none() | st.just({"a": ["b"]}), max_size=4
)
LINES = TEXTS.map(lambda text: "".join(filter(str.isprintable, text))[:MAX_CHARS]).filter(str.strip)
FACTS = st.fixed_dictionaries(
    {
        "name": TEXTS | HUB_IDS,
        "revision": st.none() | st.just(SHA) | TEXTS.filter(bool),
        "model_type": TEXTS,
        "method": TEXTS.filter(lambda text: text and text not in VLLM_QUANTISED),  # those have one more section
        "graph": TEXTS.filter(lambda name: name != "genai_config.json"),
        "dtype": TEXTS,
        "attention": st.just("portable") | TEXTS,
        "data": st.lists(TEXTS, min_size=1, max_size=2),
        "metadata": METADATA,
        "result": st.tuples(LINES, LINES, LINES),
    }
)
ORDINARY = {
    "model_type": "llama",
    "method": "bitsandbytes",
    "graph": "model.onnx",
    "dtype": "fp16",
    "metadata": {},
    "result": ("a", "acc", "1"),
}


def ordinary(facts):
    """Ordinary facts from which a card with the same parts is made."""
    is_on_hub = facts["revision"] is not None and HUB_ID.fullmatch(facts["name"])
    return {
        **ORDINARY,
        "name": facts["name"] if is_on_hub else "checkpoint",
        "revision": SHA if is_on_hub else None,
        "attention": "portable" if facts["attention"] == "portable" else "gqa",
        "data": [f"{number}.onnx_data" for number, _ in enumerate(facts["data"])],
    }


def card_of(facts):
    spec = {"span": [6, 10], "steps": 3}
    record = OnnxRecord(9, None, None, 3, facts["dtype"], facts["attention"], spec, tuple(facts["data"]))
    onnx = {facts["graph"]: record, "genai_config.json": OnnxRecord(9)}
    metadata = f"---\n{yaml.safe_dump(facts['metadata'])}---\n"
    origin = Origin(facts["name"], facts["revision"])
    name, metric, version = facts["result"]
    tasks = [{**TASK, "name": name, "metric": metric}]
    results = [made_result(made_by, *tasks, versions={version: version}) for made_by in (SPEC, OTHER)]
    measured = made_measured(own=results[:1], other=results[1:])
    options = {"quantisation": facts["method"], "tokenizer": "base", "onnx": onnx, "measured": measured}
    return make_card(CardFacts(origin, metadata, facts["model_type"], 16, SPEC, COST, **options))


def parse(card):
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    return yaml.safe_load(head), MARKDOWN.parse(body)


def blocks(tokens):
    return [(token.info, token.content) for token in tokens if token.type == "fence"]


def structure(tokens):
    """Kinds of all tokens but text and code within a line, and where the links go."""
    kinds = []
    for token in tokens:
        kinds.append((token.type, token.tag, token.info))
        inner = [each for each in token.children or () if each.type not in ("text", "code_inline")]
        kinds += [(each.type, each.attrGet("href")) for each in inner]
    return kinds


def python_shape(code):
    """The tree of Python code without the values of its strings, which must be literals."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.dump(tree)


def code_shape(info, code):
    return python_shape(code) if info == "python" else re.sub(r'"(\\.|[^"\\\n])*"', '""', code)


def plain_words(tokens):
    """Text outside of code, which some renderers look through for addresses."""
    return "\n".join(each.content for token in tokens for each in token.children or () if each.type == "text")


HOSTILE = {**ORDINARY, "name": "x\n## y", "revision": None, "attention": "portable", "data": ["a"]}


@SETTINGS
@given(FACTS)
@example({**HOSTILE, "method": "gptq.\n\n## Install first\n\n<img src=x onerror=alert(1)>"})
@example({**HOSTILE, "name": 'x" + str(__import__("os").system("id")) + "'})
@example({**HOSTILE, "result": ("a|b ![](http://evil.example)", "<b>`x``", "## www.evil.example @")})
@example({**HOSTILE, "graph": "a|b`c.onnx", "metadata": {"license": "a\n---\n# b", "license_link": "x " * 90}})
def test_card_of_any_words_is_built_as_an_ordinary_one(facts):
    for publish in (lambda card: card, lambda card: published_card(card, "me/x")):
        card, model = publish(card_of(facts)), publish(card_of(ordinary(facts)))
        card.encode()
        (values, tokens), (_, expected) = parse(card), parse(model)
        assert structure(tokens) == structure(expected)
        shapes = [[code_shape(*block) for block in blocks(each)] for each in (tokens, expected)]
        assert shapes[0] == shapes[1]
        assert not re.search(r"://|www\.|@|[`<\x00-\x09\x0b-\x1f\x7f]", plain_words(tokens))
        assert all(line.isprintable() for line in card.split("\n"))
        assert values == read_metadata(card)
        assert {key: values[key] for key in INHERITED if key in values} == {
            key: value for key, value in facts["metadata"].items() if is_one_line(value)
        }


def is_one_line(value):
    lines = value if isinstance(value, list) else [value]
    return all(isinstance(line, str) and line.isprintable() for line in lines)


@SETTINGS
@given(TEXTS)
def test_literals_mean_the_text_and_stay_on_one_line(text):
    assert ast.literal_eval(python_literal(text)) == text
    assert json.loads(javascript_literal(text)) == text
    for literal in (python_literal(text), javascript_literal(text)):
        assert "\n" not in literal
        assert literal.isprintable()


@SETTINGS
@given(TEXTS)
def test_code_is_one_span_with_the_printable_text(text):
    (token,) = MARKDOWN.parseInline(f"a {markdown_code(text)} b")
    first, code, last = token.children
    assert (first.content, code.type, last.content) == ("a ", "code_inline", " b")
    shown = "".join(char if char.isprintable() and char != "|" else "\ufffd" for char in text[:200])
    assert code.content.strip() == shown.strip()


@pytest.mark.parametrize("text", ["Llama-3.2-1B", "org/Qwen3_4B", "my model", "gptq", "v0.1", "compressed-tensors"])
def test_ordinary_words_stay_as_they_are(text):
    assert markdown_text(text) == text


@pytest.mark.parametrize("text", ["", "www.evil.example", "a.example", "_x_", "a__b", "a*b", "-a", "a\n", "x" * 201])
def test_other_words_become_code(text):
    assert markdown_text(text) == markdown_code(text)
