"""`python -m nsfs.cli`: how a private daemon is started, whatever the command is called or where it lies."""

from nsfs.cli.app import main

main()
