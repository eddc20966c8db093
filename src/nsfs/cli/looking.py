"""`nsfs ls`, `cat`, `tree` and `stat`: into an image without mounting it.

Each path is a call of its own, in order; the first that fails ends the command, after what the earlier ones printed.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from nsfs.cli import render
from nsfs.cli.options import Choice, image_options, json_option, parse_image_path
from nsfs.cli.session import Session, pass_session
from nsfs.errors import UsageError
from nsfs.model.report import Data, EntryReport, Item, Part
from nsfs.serve.api import Empty, PathRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from nsfs.cli.options import ImagePath


def _paths(command: Callable[..., None]) -> Callable[..., None]:
    return click.argument("paths", metavar="REF:/PATH...", nargs=-1, required=True)(command)


def _list(session: Session, method: str, request: PathRequest) -> list[EntryReport]:
    entries: list[EntryReport] = []

    def take(event: Data | Item | Part) -> None:
        assert isinstance(event, Item)
        entries.append(event.entry)

    session.call(method, request, Empty, take)
    return render.sort_entries(entries)


def _show(
    session: Session,
    method: str,
    paths: Iterable[str],
    choice: Choice,
    render_lines: Callable[[int, ImagePath, list[EntryReport]], Iterable[str]],
    *,
    as_json: bool,
) -> None:
    """Ask for each path and print what `render_lines` makes of its number, itself and what was found; or one array."""
    found: list[EntryReport] = []
    for number, path in enumerate(map(parse_image_path, paths)):
        entries = _list(session, method, choice.path(path))
        found += entries
        if not as_json:
            for line in render_lines(number, path, entries):
                click.echo(line)
    if as_json:
        _echo_json(found)


def _echo_json(entries: Iterable[EntryReport]) -> None:
    """One array, an entry a line."""
    click.echo("[" + ",\n ".join(render.render_json(entry, None) for entry in entries) + "]")


@click.command()
@_paths
@click.option("-l", "long", is_flag=True, help="Mode, links, owners, size and time (UTC), too.")
@image_options
@json_option
@pass_session
def ls(session: Session, paths: tuple[str, ...], *, long: bool, choice: Choice, as_json: bool) -> None:
    """List directories of an image, names with a dot included."""

    def render_lines(number: int, path: ImagePath, entries: list[EntryReport]) -> Iterator[str]:
        if len(paths) > 1:
            yield f"{chr(10) if number else ''}{path.text}:"
        named = [(render.name_below(entry.path, path.path), entry) for entry in entries]
        yield from render.render_listing(named, long=long)

    _show(session, "List", paths, choice, render_lines, as_json=as_json)


@click.command()
@_paths
@image_options
@pass_session
def cat(session: Session, paths: tuple[str, ...], *, choice: Choice) -> None:
    """Write files of an image to standard output; fetches no other content, once their layers are indexed."""
    output = sys.stdout.buffer

    def take(event: Data | Item | Part) -> None:
        assert isinstance(event, Data)
        output.write(event.data)

    for path in map(parse_image_path, paths):
        if path.path == b"/":
            raise UsageError(f"no path behind the image: {path.text!r}", hint="write REF:/path")
        session.call("Read", choice.path(path), Empty, take)
    output.flush()


@click.command()
@_paths
@image_options
@json_option
@pass_session
def tree(session: Session, paths: tuple[str, ...], *, choice: Choice, as_json: bool) -> None:
    """Show everything below directories of an image."""

    def render_lines(_number: int, path: ImagePath, entries: list[EntryReport]) -> Iterable[str]:
        return render.render_tree(entries, path.path)

    _show(session, "Tree", paths, choice, render_lines, as_json=as_json)


@click.command()
@_paths
@image_options
@json_option
@pass_session
def stat(session: Session, paths: tuple[str, ...], *, choice: Choice, as_json: bool) -> None:
    """Show what an image says about files; of a symlink, about itself."""
    found: list[EntryReport] = []
    for path in map(parse_image_path, paths):
        entry = session.call("Stat", choice.path(path), EntryReport)
        found.append(entry)
        if not as_json:
            click.echo("\n".join(render.render_stat(entry)))
    if as_json:
        _echo_json(found)
