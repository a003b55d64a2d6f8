"""`python -m loracle.cli`: the console command without its script."""

from . import main

main()
