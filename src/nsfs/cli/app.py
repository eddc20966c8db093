"""The root command: global options, the list of commands, and the way every failure ends.

Owns the exit codes as users see them, and the translation of errors to them. Command modules are imported when their
command is used, so that no command waits for the libraries of another. One thread; Ctrl-C ends any command with 130.
"""

from __future__ import annotations

import errno
import gc
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from nsfs import __version__
from nsfs.cli.exits import BROKEN_PIPE, EXITS, INTERRUPTED
from nsfs.cli.session import Session
from nsfs.cli.talk import PlainTalk, open_talk
from nsfs.errors import NoSpaceError, NsfsError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

_COMMANDS = {
    "mount": "nsfs.cli.mounting",
    "umount": "nsfs.cli.mounting",
    "ls": "nsfs.cli.looking",
    "cat": "nsfs.cli.looking",
    "tree": "nsfs.cli.looking",
    "stat": "nsfs.cli.looking",
    "inspect": "nsfs.cli.images",
    "pull": "nsfs.cli.pulling",
    "evict": "nsfs.cli.images",
    "pin": "nsfs.cli.caching",
    "unpin": "nsfs.cli.caching",
    "offline": "nsfs.cli.caching",
    "cache": "nsfs.cli.caching",
    "index": "nsfs.cli.index",
    "status": "nsfs.cli.images",
    "ns": "nsfs.cli.namespaces",
    "policy": "nsfs.cli.policy",
    "bench": "nsfs.cli.bench",
    "login": "nsfs.cli.accounts",
    "logout": "nsfs.cli.accounts",
    "serve": "nsfs.cli.host",
    "upgrade": "nsfs.cli.lifecycle",
    "drain": "nsfs.cli.lifecycle",
    "uninstall": "nsfs.cli.uninstall",
    "doctor": "nsfs.cli.host",
    "completion": "nsfs.cli.host",
    "man": "nsfs.cli.host",
}


class Root(click.Group):
    """The `nsfs` command."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """In the order of a day's work, not of the alphabet."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the module of `cmd_name` now."""
        if cmd_name not in _COMMANDS:
            return None
        command = getattr(importlib.import_module(_COMMANDS[cmd_name]), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Show the exit codes."""
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXITS])

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401  as click has it
        """Run the command; every expected failure becomes a message on stderr and an exit code."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            _abandon_output()
            ctx.exit(BROKEN_PIPE)
        except (KeyboardInterrupt, click.Abort):
            ctx.exit(INTERRUPTED)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            ctx.exit(error.exit_code)
        except click.ClickException as error:
            _session(ctx).talk.error(_from_click(error))
            ctx.exit(error.exit_code)
        except NsfsError as error:
            _session(ctx).talk.error(error)
            ctx.exit(error.exit_code)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            _abandon_output()
            _session(ctx).talk.error(NoSpaceError("no space left for the output"))
            ctx.exit(NoSpaceError.exit_code)
        else:
            return result

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,  # noqa: FBT001, FBT002  as click has it
        **extra: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """As click's, but errors in the global options look like all others."""
        try:
            code = super().main(args, prog_name or "nsfs", complete_var, standalone_mode=False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = error.exit_code
        except click.ClickException as error:
            PlainTalk(sys.stderr).error(_from_click(error))
            code = error.exit_code
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


def _abandon_output() -> None:
    """Let what is still buffered go nowhere, so that the interpreter's end does not fail on it, too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _session(ctx: click.Context) -> Session:
    return ctx.obj if isinstance(ctx.obj, Session) else Session(None, PlainTalk(sys.stderr), None, None)


def _from_click(error: click.ClickException) -> NsfsError:
    message = error.format_message().rstrip(".")
    where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "nsfs"
    return UsageError(message[:1].lower() + message[1:], hint=f"try {where} --help")


@click.command(cls=Root, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nsfs", message="%(prog)s %(version)s")
@click.option("--socket", metavar="PATH", envvar="NSFS_SOCKET", help="Ask the daemon at this socket, and no other.")
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), help="How stderr talks, and the daemon's log. [text]"
)
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="From what on it talks. [info]"
)
@click.pass_context
def nsfs(ctx: click.Context, socket: str | None, log_format: str | None, log_level: str | None) -> None:
    """Root filesystems of container images, whose bytes are fetched when they are read.

    REF follows docker's habits: python:3.12, registry.example:5000/team/app@sha256:…, or oci:DIR[:TAG] for an OCI
    layout on disk. Root asks the system's daemon where one runs; otherwise a private daemon of the user is started
    on demand and ends with its last mount.
    """
    talk = ctx.with_resource(open_talk(log_format or "text", log_level or "info", sys.stderr))
    ctx.obj = Session(socket, talk, log_format, log_level)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `arguments` (the process's own by default) and exit."""
    try:
        nsfs.main(arguments, prog_name="nsfs")
    finally:
        gc.freeze()  # the interpreter's end looks through all that it knows else, for 10 ms of the 130 of a command
