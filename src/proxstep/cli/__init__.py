"""The command line."""

from proxstep.cli.commands import main

__all__ = ["main"]
