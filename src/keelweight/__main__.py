"""`python -m keelweight`."""

from keelweight.cli import main

main()
