"""The command line: `blip2-serve up` starts the server, `caption` and `ask` are small clients."""

from blip2_serve.cli.commands import main

__all__ = ["main"]
