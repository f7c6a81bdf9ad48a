"""`python -m safer_fast` is the `safer-fast` command, also from an uninstalled checkout."""

from .cli import main

main()
