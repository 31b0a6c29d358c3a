"""The command line: thin commands over the public functions; nothing heavy is imported for ``--help``."""

from cusprun.cli.app import main

__all__ = ["main"]
