"""`python -m auricle.tools`: the command line."""

from .cli.main import run

run()
