"""The command line: words into requests, reports into text; decides nothing about images, mounts or access."""

from nsfs.cli.app import main

__all__ = ["main"]
