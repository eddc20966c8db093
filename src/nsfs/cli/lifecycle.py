"""`nsfs drain` and `upgrade`: how a daemon ends, and how another takes its place."""

from __future__ import annotations

import math
import time
from typing import Final

import click

from nsfs.cli.options import json_option
from nsfs.cli.render import render_json
from nsfs.cli.session import Session, pass_session
from nsfs.errors import NsfsError, UnreachableError
from nsfs.model.report import render_count
from nsfs.serve import api

_DEADLINE: Final = 120.0
"""Seconds for the new daemon to answer and to have replaced all workers."""
_LOOK: Final = 0.1
_GONE: Final = 15.0
"""Seconds for somebody to be at the socket again: all through an upgrade somebody is, but where it fails."""


@click.command()
@click.option("--force", is_flag=True, help="Though somebody uses them: mounts and containers lose their files.")
@json_option
@pass_session
def drain(session: Session, *, force: bool, as_json: bool) -> None:
    """Take all mounts away and end the daemon; refuses while containers or mounts are in use."""
    drained = session.call("Drain", api.DrainRequest(force=force), api.Drained)
    if as_json:
        click.echo(render_json(drained))
    taken = f" and {render_count(drained.mounts, 'mount')} with it" if drained.mounts else ""
    session.talk.note(f"the daemon ends{taken}")


@click.command()
@json_option
@pass_session
def upgrade(session: Session, *, as_json: bool) -> None:
    """Replace daemon and workers by the code that is installed now; mounts and containers go on meanwhile."""
    before = session.look()
    report = session.call("Upgrade", api.Empty(), api.UpgradeReport)
    _wait(session, report.build, before.incarnation)
    if as_json:
        click.echo(render_json(report))
    session.talk.note(f"{report.build} has taken the place of {report.was}")


def _wait(session: Session, build: str, before: str) -> None:
    """Until another daemon answers, of that build, and all workers are of the same."""
    deadline, gone = time.monotonic() + _DEADLINE, math.inf
    state = "the new daemon does not answer"
    while time.monotonic() < min(deadline, gone):
        time.sleep(_LOOK)
        try:
            version = session.look()
        except UnreachableError:
            gone = min(gone, time.monotonic() + _GONE)
            continue
        gone = math.inf
        if version.incarnation == before:
            continue
        if version.kept_back:
            raise NsfsError(
                f"new workers do not answer, so older ones go on: {', '.join(version.kept_back)}",
                hint="the daemon's log says more",
            )
        if version.build == build and not version.outdated:
            return
        state = f"workers are still of older code: {', '.join(version.outdated)}"
    if gone < math.inf:
        raise UnreachableError(
            "the new daemon has ended", hint="its log says why; mounts go on, for the next nsfs serve"
        )
    raise UnreachableError(state, hint="the daemon's log says more")
