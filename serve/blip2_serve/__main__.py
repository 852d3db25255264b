"""Runs the command line: `python -m blip2_serve`."""

from blip2_serve.cli import main

main()
