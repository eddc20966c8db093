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


@click.command()
@click.argument("reference", metavar="REF")
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("--rw", "writable", is_flag=True, help="Writable; what is written goes with the mount.")
@click.option("--driver", default="auto", show_default=True, metavar="D", help="auto, erofs, erofs-loop or fuse.")
@image_options
@click.option("--on-error", default="", metavar="X", help="Unreachable content: wait, wait:60s or eio. [the daemon's]")
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
    stopped = _catch_signals() if foreground else None
    image = choice.image(reference)
    request = api.MountRequest(**msgspec.structs.asdict(image), target=mount_point(directory), **wishes)
    report = session.call("Mount", request, api.MountReport)
    if as_json:
        click.echo(render_json(report))
    session.talk.note(
        f"{report.reference} is at {report.target}: {render_count(report.files, 'file')}, {render_size(report.size)}, "
        f"{render_size(report.local)} of it local, driver {report.driver}"
    )
    if stopped is not None:
        _stay(session, report.target, stopped)


def _catch_signals() -> threading.Event:
    """Have SIGTERM and SIGHUP end the command as Ctrl-C does: by KeyboardInterrupt, until `_stay` takes them over."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    return threading.Event()


def _stay(session: Session, target: str, stopped: threading.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda _number, _frame: stopped.set())
    session.talk.note("press Ctrl-C to unmount")
    stopped.wait()
    try:
        session.call("Umount", api.UmountRequest(target=target), api.Empty)
    except NotFoundError:
        session.talk.note(f"was unmounted by somebody else: {target}")


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
