"""What the commands share: which daemon to ask, by whose voice to speak.

A Session lives as long as one command. `call` is the only way from a command to a daemon.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import click
from msgspec import Struct

from nsfs.model.report import Data, Item, Note, Part, Progress

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from nsfs.cli.talk import Talk
    from nsfs.serve.api import VersionReport
    from nsfs.serve.client import Control

R = TypeVar("R", bound=Struct)


@dataclass(slots=True)
class Session:
    """The global options of one command, and its connection once it has one."""

    socket: str | None
    talk: Talk
    log_format: str | None
    log_level: str | None
    _control: Control | None = None

    def call(
        self, method: str, request: Struct, kind: type[R], take: Callable[[Data | Item | Part], None] | None = None
    ) -> R:
        """Ask the daemon; progress and notes are said, `take` gets the rest. Raises what the daemon raised."""

        def listen(event: Progress | Note | Data | Item | Part) -> None:
            if isinstance(event, Progress):
                self.talk.progress(event)
            elif isinstance(event, Note):
                self.talk.note(event.text)
            elif take is not None:
                take(event)

        return self._connected().call(method, request, kind, listen)

    def _connected(self) -> Control:
        if self._control is None:
            self._control = click.get_current_context().with_resource(self._open())
        return self._control

    def look(self) -> VersionReport:
        """Who answers now where we are connected, over another connection; raises UnreachableError."""
        from nsfs.serve.client import open_control  # noqa: PLC0415  grpc takes 80 ms to import

        with open_control(self._connected().path) as control:
            return control.version

    def _open(self) -> AbstractContextManager[Control]:
        from nsfs.cli.locate import open_daemon  # noqa: PLC0415  grpc takes 80 ms to import

        return open_daemon(self.socket, os.environ, os.geteuid())


def pass_session(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` the Session as its first argument."""
    return click.make_pass_decorator(Session)(command)
