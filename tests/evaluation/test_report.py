"""The report loads nothing, shows strangers' text as text, and is written whole."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from loopexport.errors import OutputError
from loopexport.evaluation import report
from loopexport.evaluation.items import Answer
from loopexport.evaluation.noise import Floor
from loopexport.evaluation.report import report_files, write_report
from loopexport.evaluation.verdicts import compare_pairs
from support.answer_pairs import make_pair, make_task

HOSTILE = "</pre></details><script>alert(1)</script><img src=https://evil.example/x onerror='a()'>&lt;\"$x^{\ud800\x00"
OWN_TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "ul", "li"}
OWN_TAGS |= {"table", "tr", "th", "td", "picture", "source", "img", "details", "summary", "pre"}


class Page(HTMLParser):
    """The tags, links and text of a page."""

    def __init__(self, content: bytes):
        super().__init__()
        self.tags, self.links, self.texts = [], [], []
        self.feed(content.decode("utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "srcset", "href")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "\n".join(self.texts)


@pytest.fixture(autouse=True)
def _plain_forest(monkeypatch):
    """Tests of the page need no picture; `test_plots` draws."""
    monkeypatch.setattr(report, "forest_png", lambda *_: b"picture")


def page_of(pairs, settings=None, floor=None, **options):
    return Page(report_files(compare_pairs(pairs, **options), pairs, settings or {}, floor)["report.html"])


def test_page_begins_with_the_answer_and_has_every_part():
    page = page_of(make_task(40, 12, 500), {"dtype": "bfloat16", "seeds": [1, 2]}, Floor(100, 0.03, 1, (8, 1)))
    heading = page.texts.index("Does the loop help?", 2)
    assert page.texts[heading + 1].startswith("The loop is better on quiz by 5.6 points")
    for part in ("+2.9 to +8.6", "<0.001", "bfloat16", "[1, 2]", "1 of 100 items flipped", "quiz (acc): 52"):
        assert part in page.text


def test_page_shows_each_flipped_item_with_both_answers():
    base, loop = Answer(0, "it is B", tokens=9, truncated=True), Answer(1, "it is A", (-1.5, -2.25))
    page = page_of([make_pair(base, loop, 3, prompt="A or B?", target="A"), make_pair(base, base, 4, prompt="same")])
    for part in (
        "gained: item 3, seed 0",
        "A or B?",
        "it is B",
        "it is A",
        "Base, score 0; 9 tokens, cut at the limit",
    ):
        assert part in page.texts
    assert "Loop, score 1; log-likelihoods -1.500, -2.250" in page.texts
    assert "same" not in page.texts
    assert page.tags.count("details") == 1


def test_strangers_text_is_text():
    answers = Answer(0, HOSTILE), Answer(1, HOSTILE)
    pairs = [make_pair(*answers, i, task=HOSTILE, metric=HOSTILE, prompt=HOSTILE, target=HOSTILE) for i in range(9)]
    page = page_of(pairs, {HOSTILE: HOSTILE, "list": [HOSTILE]}, groups={HOSTILE: [HOSTILE]})
    assert set(page.tags) <= OWN_TAGS
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert page.texts.count(HOSTILE.replace("\ud800", "?")) >= 4 * 9


def test_page_forbids_scripts_and_loads_nothing():
    content = report_files(compare_pairs(make_task(1, 0, 9)), [], {}, None)["report.html"]
    assert b"default-src 'none'; img-src data:; style-src 'unsafe-inline'" in content
    assert b"http" not in content.replace(b"http-equiv", b"")


def test_long_texts_and_many_flips_are_cut_and_the_page_says_so(monkeypatch):
    monkeypatch.setattr(report, "MAX_CHARS", 10)
    monkeypatch.setattr(report, "MAX_FLIPS", 3)
    page = page_of([make_pair(0, 1, i, prompt="0123456789the end") for i in range(5)])
    assert "Prompt (the last 10 of 17 characters)" in page.texts
    assert "789the end" in page.texts
    assert "quiz (acc): 5, the first 3 of them here" in page.texts
    assert page.tags.count("details") == 3


def test_page_without_flips():
    assert "None." in page_of(make_task(0, 0, 5)).texts


def test_write_report_replaces_both_files_and_leaves_no_others(tmp_path):
    (tmp_path / "report.html").write_text("older")
    write_report(tmp_path, compare_pairs(make_task(1, 0, 9)), make_task(1, 0, 9), {}, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["forest.png", "report.html"]
    assert (tmp_path / "report.html").read_bytes().startswith(b"<!doctype html>")


def test_report_cannot_replace_a_directory(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match="it is a directory"):
        write_report(tmp_path, compare_pairs(make_task(1, 0, 9)), [], {}, None)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
