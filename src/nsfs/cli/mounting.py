"""`nsfs mount` and `nsfs umount`."""

from __future__ import annotations

import signal
import threading
from typing import TypedDict, Unpack

import click
import msgspec

from nsfs.cli.options import Choice, image_options, json_option, mount_point
from nsfs.cli.render import render_json
from nsfs.cli.session import Session, pass_session
from nsfs.errors import NotFoundError
from nsfs.model.report import render_count, render_size
from nsfs.serve import api


class _Wishes(TypedDict):
    """What of a mount is the daemon's to judge."""

    driver: str
    writable: bool
    on_error: str
    profile: str


@click.command()
@click.argument("reference", metavar="REF")
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("--rw", "writable", is_flag=True, help="Writable; what is written goes with the mount.")
@click.option("--driver", default="auto", show_default=True, metavar="D", help="auto, erofs, erofs-loop or fuse.")
@image_options
@click.option("--on-error", default="", metavar="X", help="Unreachable content: wait, wait:60s or eio. [the daemon's]")
@click.option(
    "--profile",
    type=click.Choice(["record", "use", "off"]),
    default="use",
    show_default=True,
    help="What a start reads: record it, fetch what was recorded, or neither.",
)
@click.option("--foreground", is_flag=True, help="Stay until interrupted, then unmount.")
@json_option
@pass_session
def mount(
    session: Session,
    reference: str,
    directory: str,
    *,
    choice: Choice,
    foreground: bool,
    as_json: bool,
    **wishes: Unpack[_Wishes],
) -> None:
    """Mount the image REF at the existing directory DIR; its bytes are fetched when they are read."""
    image = choice.image(reference)
    request = api.MountRequest(**msgspec.structs.asdict(image), target=mount_point(directory), **wishes)
    stop = _Stop() if foreground else None
    try:
        report = session.call("Mount", request, api.MountReport)
    except KeyboardInterrupt:
        if stop is not None:
            _take_away(session, request.target)
        raise
    if stop is not None:
        stop.defer()
    if as_json:
        click.echo(render_json(report))
    session.talk.note(
        f"{report.reference} is at {report.target}: {render_count(report.files, 'file')}, {render_size(report.size)}, "
        f"{render_size(report.local)} of it local, driver {report.driver}"
    )
    if stop is not None:
        session.talk.note("press Ctrl-C to unmount")
        stop.wait()
        _take_away(session, report.target)


class _Stop:
    """What SIGINT, SIGTERM and SIGHUP do to a mount in the foreground: they interrupt its making, and later end it."""

    def __init__(self) -> None:
        self._is_deferred = False
        self._asked = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._handle)

    def _handle(self, _number: int, _frame: object) -> None:
        if not self._is_deferred:
            raise KeyboardInterrupt
        self._asked.set()

    def defer(self) -> None:
        """From now on a signal ends `wait`, and nothing else."""
        self._is_deferred = True

    def wait(self) -> None:
        """Until a signal."""
        self._asked.wait()


def _take_away(session: Session, target: str) -> None:
    try:
        session.call("Umount", api.UmountRequest(target=target), api.Empty)
    except NotFoundError:
        session.talk.note(f"nothing is left to unmount: {target}")


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("--force", is_flag=True, help="Also where it is in use: detach it, and fail reads that wait.")
@json_option
@pass_session
def umount(session: Session, directory: str, *, force: bool, as_json: bool) -> None:
    """Take away what nsfs mounted at DIR."""
    request = api.UmountRequest(target=mount_point(directory), force=force)
    session.call("Umount", request, api.Empty)
    if as_json:
        click.echo(render_json(request))
