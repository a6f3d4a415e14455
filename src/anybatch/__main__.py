"""`python -m anybatch` is the `anybatch` command."""

from anybatch.cli import main

main()
