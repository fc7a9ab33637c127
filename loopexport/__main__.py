"""`python -m loopexport`."""

from .cli import main

main(prog_name="loopexport")
