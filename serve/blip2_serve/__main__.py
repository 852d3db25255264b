"""`python -m blip2_serve` is the command line."""

from blip2_serve.cli import main

main()
