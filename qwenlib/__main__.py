"""`python -m qwenlib` is the `qwenlib` command."""

from qwenlib.cli import main

main()
