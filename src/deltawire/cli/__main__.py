"""`python -m deltawire.cli` is `deltawire`."""

from deltawire.cli import main

main()
