"""`loopexport push`."""

from __future__ import annotations

import click

from loopexport.cli.options import directory_argument, json_option
from loopexport.cli.output import echo_json, echo_lines, echo_note
from loopexport.cli.progress import ByteBar


@click.command(short_help="Publish an export on the Hub.")
@directory_argument
@click.argument("repo_id")
@click.option("--revision", help="Branch to push to; created if necessary.  [default: main]")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of changing the branch.")
@click.option("--commit-message", help="Message of the commit.")
@click.option("--token", help="Hub token.  [default: HF_TOKEN, or the saved login]")
@click.option("--no-server-copy", is_flag=True, help="Upload all weights, even if the Hub could copy them.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print how each file would travel, and send nothing. Asks the Hub, so it needs a token.",
)
@json_option
def push(directory, repo_id, as_json, no_server_copy, **options) -> None:
    """Publish the export DIRECTORY as the model REPO_ID on the Hub, in one commit.

    The Hub copies weights from the base's repository where it can, and files that it already has are not sent. After a
    failure, run the same command again.
    """
    from loopexport.cli.text import push_lines

    plan, result = push_export(directory, repo_id, server_copy=not no_server_copy, **options)
    if as_json:
        echo_json(result.to_dict())
    else:
        echo_lines(push_lines(plan, result))


def push_export(directory, repo_id: str, *, dry_run: bool = False, **options):
    """Plan and carry out a push, with a progress bar and notes; returns the plan and the result."""
    from loopexport.export.directory import open_export
    from loopexport.hub.publication import plan_push

    manifest = open_export(directory).manifest
    sizes = [each.size for each in manifest.weights.values()] + [each.size for each in manifest.onnx.values()]
    with ByteBar("hashing weights", sum(sizes)) as advance:
        plan = plan_push(directory, repo_id, progress=advance, **options)
    for warning in plan.warnings:
        echo_note(warning)
    return plan, plan.preview() if dry_run else plan.apply(echo_note)
