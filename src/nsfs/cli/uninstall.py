"""`nsfs uninstall`: what the system's daemon made on this host goes, so that nobody loses anything unasked.

Refuses while containers or mounts are used, and to delete what containerd's snapshots have, unless it is forced; never
deletes a directory that is no daemon's. Containerd's configuration and the package are not touched.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from contextlib import suppress
from typing import Final

import click

from nsfs.cli.locate import answers
from nsfs.cli.session import Session, pass_session
from nsfs.errors import BusyError, NotFoundError, UsageError
from nsfs.model.encryption import Encrypt
from nsfs.model.report import render_count
from nsfs.serve import api
from nsfs.serve.client import open_control
from nsfs.serve.config import SYSTEM_CONFIG, Config, load_config, load_system_config
from nsfs.serve.mounts import load_mounts
from nsfs.store.domains import Domains
from nsfs.store.keys import Keys
from nsfs.store.layout import Layout
from nsfs.store.trees import delete_tree

_DEADLINE: Final = 60.0
"""Seconds for a daemon to take everything away."""
_LOOK: Final = 0.1


@click.command()
@click.option("--config", "path", metavar="FILE", type=click.Path(), help=f"The daemon's. [{SYSTEM_CONFIG}]")
@click.option("--purge", is_flag=True, help="Delete pools, indexes, keys and snapshots, too.")
@click.option("--force", is_flag=True, help="Though containers or mounts use it: they lose their files.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_session
def uninstall(session: Session, path: str | None, *, purge: bool, force: bool, yes: bool) -> None:
    """End the system's daemon with all its mounts; with --purge delete what it had on disk."""
    config = load_config(path) if path is not None else load_system_config()
    layout = Layout(config.root, config.run)
    if purge and not yes:
        _ask(layout.root)
    if purge:
        _check(layout, force=force)
    if answers(config.socket):
        _drain(config, force=force)
    _refuse_mounted(layout)
    if purge:
        _purge(layout)
    with suppress(OSError):
        delete_tree(layout.run)
    session.talk.note(f"nsfs is gone from this host{f', but for {layout.root}' if os.path.exists(layout.root) else ''}")


def _ask(root: str) -> None:
    """Go on where somebody agrees; raises UsageError where nobody is there."""
    if not sys.stdin.isatty():
        raise UsageError(f"nobody is asked here whether to delete it: {root}", hint="--yes says so beforehand")
    click.confirm(f"Delete {root}, with the contents of all images and snapshots?", abort=True, err=True)


def _drain(config: Config, *, force: bool) -> None:
    with open_control(config.socket) as control:
        control.call("Drain", api.DrainRequest(force=force), api.Drained)
    deadline = time.monotonic() + _DEADLINE
    while not _is_free(Layout(config.root, config.run).lock):
        if time.monotonic() > deadline:
            raise BusyError(f"the daemon does not end: {config.socket}", hint="its log says more")
        time.sleep(_LOOK)


def _is_free(lock: str) -> bool:
    """Whether no daemon holds it."""
    with open(lock, "rb") as file, suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _refuse_mounted(layout: Layout) -> None:
    ours = (layout.lowers + "/", os.path.join(layout.run, "domains") + "/")
    left = [mount.target for mount in load_mounts() if mount.target.startswith(ours)]
    if left:
        raise BusyError(
            f"{render_count(len(left), 'mount')} of a daemon that does not answer: {left[0]}",
            hint="start nsfs serve, which goes on with them, and try again",
        )


def _check(layout: Layout, *, force: bool) -> None:
    """Refuse to delete what nobody meant."""
    if not os.path.exists(layout.meta):
        raise NotFoundError(f"no daemon ever had its state there: {layout.root}", hint="--config names the daemon's")
    with suppress(FileNotFoundError):
        found = os.listdir(layout.snapshots)
        if found and not force:
            raise BusyError(
                f"containerd has {render_count(len(found), 'snapshot')} there: {layout.snapshots}",
                hint="remove its images and containers of this snapshotter first, or use --force",
            )


def _purge(layout: Layout) -> None:
    domains = Domains(layout, Keys(layout, None), Encrypt.OFF)
    for name in domains.names():
        domains.delete(name)  # its key first
    delete_tree(layout.root)
