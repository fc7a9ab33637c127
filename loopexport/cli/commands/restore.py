"""`loopexport restore`."""

from __future__ import annotations

import click

from loopexport.cli.options import complete_directory, directory_argument, restore_weights_option
from loopexport.cli.output import echo_line
from loopexport.cli.progress import ByteBar


@click.command(short_help="Write an export's base to a new directory, bit for bit.")
@directory_argument
@click.argument("out", shell_complete=complete_directory)
@restore_weights_option
def restore(directory, out, weights) -> None:
    """Write the base of the export DIRECTORY to OUT, bit for bit.

    Before that, hash the weights that have a recorded digest.
    """
    from loopexport.export.directory import open_export
    from loopexport.export.restoration import restore as restore_base

    with ByteBar("restoring weights", 0) as advance:
        base = restore_base(directory, out, weights=weights, progress=advance)
    trained = open_export(directory).manifest.trained
    what = f"the model trained from {base.origin.name}, without its loop" if trained else f"the base {base.origin.name}"
    echo_line(f"Wrote {base.root}, {what}")
