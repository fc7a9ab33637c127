"""`python -m loopexport`."""

from loopexport.cli import main

main(prog_name="loopexport")
