"""`python -m halfbyte` is the command line."""

from halfbyte.cli import main

main()
