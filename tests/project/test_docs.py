"""The documentation: every command is in it, its links lead somewhere, its commands parse, its pictures are current."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys

import click
import pytest

import loopexport
import loopexport.onnx
from loopexport.cli.commands import main
from support.commands import run
from support.paths import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
PICTURES = DOCS / "pictures"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def leaves(group: click.Group = main, prefix: str = ""):
    """Name and command of every command that does something."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


def blocks(page, *languages: str) -> list[str]:
    """The code blocks of a page in one of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def anchors(page) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands_in(text: str) -> list[list[str]]:
    """The words of each `loopexport` command in a block of shell."""
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [each[1:] for each in words if each[:1] == ["loopexport"] and len(each) > 1]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize(("name", "command"), leaves(), ids=[name for name, _ in leaves()])
def test_every_command_and_option_is_documented(name, command):
    text = (DOCS / "cli.md").read_text()
    section = re.search(rf"^## loopexport {name}\n(.*?)(^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]
    options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
    assert [option for option in options if option not in section] == []


@pytest.mark.parametrize("module", [loopexport, loopexport.onnx], ids=lambda module: module.__name__)
def test_every_public_name_is_documented(module):
    headings = re.findall(r"^### (\w+)$", (DOCS / "python-api.md").read_text(), re.MULTILINE)
    assert {name for name in module.__all__ if not name.startswith("__")} <= set(headings)


@each_page
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        path, _, anchor = link.partition("#")
        if path.startswith("https://"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_shell_commands_parse(page):
    for text in blocks(page, "sh"):
        for words in commands_in(text):
            name, *arguments = words
            command = main.commands[name]
            if isinstance(command, click.Group):
                command, arguments = command.commands[arguments[0]], arguments[1:]
            command.make_context(name, list(arguments))


@each_page
def test_python_code_compiles(page):
    for text in blocks(page, "python"):
        if not re.match(r"(>>>|\w+(\.\w+)?\(|\w+\.\w+: )", text) or page.name != "python-api.md":
            ast.parse(text)


def test_every_page_is_on_the_site():
    listed = re.findall(r"^  - .*: (\S+\.md)$", (DOCS / "site" / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))


def test_pages_link_to_nothing_outside_of_the_site():
    for page in DOCS.glob("*.md"):
        assert not re.search(r"\]\(\.\./|=\"\.\./", page.read_text()), page


def test_pictures_are_what_the_scripts_draw():
    done = subprocess.run([sys.executable, PICTURES / "draw.py", "--check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_picture_is_shown_light_and_dark():
    names = {path.name.rsplit("-", 1)[0] for path in PICTURES.glob("*.svg")}
    shown = "".join(page.read_text() for page in PAGES)
    for name in names:
        assert f"pictures/{name}-light.svg" in shown
        assert f"pictures/{name}-dark.svg" in shown


@pytest.mark.skipif("LOOPEXPORT_SMOLLM" not in os.environ, reason="needs SmolLM2, see test_real_model.py")
def test_terminal_picture_shows_what_convert_prints(tmp_path, monkeypatch):
    recorded = json.loads((PICTURES / "data" / "terminal.json").read_text())[0]
    _, command, _, *options = shlex.split(recorded["command"])
    monkeypatch.chdir(tmp_path)
    printed = run(command, os.environ["LOOPEXPORT_SMOLLM"], *options, "--dry-run").stdout.splitlines()
    assert printed[:-1] == recorded["output"][:-1], "run `make picture-data pictures`"
