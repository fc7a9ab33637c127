"""The card on the Hub: edits there survive, and otherwise it follows the export."""

from __future__ import annotations

import json

import loopexport
from loopexport.export.card import read_metadata
from loopexport.export.small_files import export_card
from support.push import BASE, REPO, pushed, remote_card


def edit_remote_card(hub, change):
    files = hub.repositories[REPO].files()
    hub.commit(REPO, {**files, "README.md": change(files["README.md"].decode()).encode()})


def test_card_edited_on_the_hub_survives_every_push(hub, push, export):
    pushed(push("--json"))
    edit_remote_card(hub, lambda card: card.replace("- looped\n", "- mine\n") + "\n## My results\n")
    edited = remote_card(hub)
    for steps in (5, 6):
        config = json.loads((export / "config.json").read_text())
        (export / "config.json").write_text(json.dumps({**config, "loop_steps": steps}))
        done = push("--json")
        assert pushed(done)["commit"] == hub.repositories[REPO].refs["main"]
        assert "Note: README.md was edited on the Hub" in done.stderr
        assert remote_card(hub).endswith("\n## My results\n")
        assert read_metadata(remote_card(hub))["tags"] == ["custom_code", "mine", "loopexport", "looped"]
        assert remote_card(hub).split("\n---\n", 1)[1] == edited.split("\n---\n", 1)[1]
    assert push("--json").stderr.count("was edited") == 1
    assert {file["how"] for file in pushed(push("--json"))["files"]} == {"there"}


def test_card_that_nobody_touched_on_the_hub_follows_the_export(hub, push, export):
    pushed(push("--json"))
    (export / "README.md").write_text("---\nlicense: mit\n---\n# My own words\n")
    pushed(push("--json"))
    assert remote_card(hub).endswith("# My own words\n")
    (export / "README.md").write_text("---\nlicense: mit\n---\n# Other words\n")
    pushed(push("--json"))
    assert remote_card(hub).endswith("# Other words\n")


def test_card_that_was_there_first_keeps_its_words_and_gets_the_metadata(hub, push):
    hub.commit(REPO, {"README.md": b"---\nlicense: mit\ntags: [mine]\n---\nmine\n"})
    pushed(push("--json"))
    metadata = read_metadata(remote_card(hub))
    assert remote_card(hub).endswith("---\nmine\n")
    assert (metadata["license"], metadata["base_model"]) == ("mit", BASE)
    assert metadata["tags"] == ["mine", "custom_code", "looped", "loopexport"]


def test_card_of_metadata_alone_gets_the_exports_text(hub, push):
    hub.commit(REPO, {"README.md": b"---\nlicense: mit\n---\n"})
    pushed(push("--json"))
    assert read_metadata(remote_card(hub))["license"] == "mit"
    assert "Gains are not guaranteed" in remote_card(hub)


def test_card_made_of_an_export_is_the_one_that_the_conversion_wrote(converted, weightless):
    for root in (converted, weightless):
        assert export_card(loopexport.open_export(root)) == (root / "README.md").read_text()


def test_card_that_was_deleted_here_is_made_anew(hub, push, export):
    (export / "README.md").unlink()
    pushed(push("--json"))
    assert "Gains are not guaranteed" in remote_card(hub)
