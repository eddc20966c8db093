"""Manual pages (man(7) roff) from the commands' own help. Pure.

One page for nsfs and one for each command, so that the pages can never say something else than `--help`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from nsfs.cli.exits import EXITS

if TYPE_CHECKING:
    from collections.abc import Iterator


def render_pages(root: click.Group, version: str) -> dict[str, str]:
    """File name and text of every page, nsfs.1 first."""
    return dict(_render_all(click.Context(root, info_name="nsfs"), version))


def _render_all(context: click.Context, version: str) -> Iterator[tuple[str, str]]:
    """The page of a command, and of those below it."""
    yield f"{_page_of(context)}.1", _render_page(context, version)
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            command = context.command.get_command(context, name)
            if command is not None and not command.hidden:
                yield from _render_all(click.Context(command, context, name), version)


def _page_of(context: click.Context) -> str:
    """Its name: nsfs-policy-explain."""
    above = f"{_page_of(context.parent)}-" if context.parent else ""
    return f"{above}{context.info_name}"


def _render_page(context: click.Context, version: str) -> str:
    command = context.command
    name = _page_of(context)
    lines = [
        f'.TH "{name.upper()}" "1" "" "nsfs {version}" "nsfs"',
        ".SH NAME",
        f"{_escape(name)} \\- {_escape(command.get_short_help_str(200).rstrip('.'))}",
        ".SH SYNOPSIS",
        f".B {_escape(context.command_path)}",
        _escape(" ".join(command.collect_usage_pieces(context))),
        ".SH DESCRIPTION",
        *_paragraphs(command.help or ""),
        *_options(context),
    ]
    if isinstance(command, click.Group):
        lines += _commands(context, command)
    lines += _epilog(context)
    return "\n".join(lines) + "\n"


def _paragraphs(text: str) -> list[str]:
    return [line for part in text.split("\n\n") for line in (".PP", _escape(" ".join(part.split())))]


def _options(context: click.Context) -> list[str]:
    records = [record for param in context.command.get_params(context) if (record := param.get_help_record(context))]
    return [".SH OPTIONS", *_definitions(records)] if records else []


def _commands(context: click.Context, group: click.Group) -> list[str]:
    commands = [(name, group.get_command(context, name)) for name in group.list_commands(context)]
    rows = [
        (f"{_page_of(context)}-{name}(1)", command.get_short_help_str(200)) for name, command in commands if command
    ]
    return [".SH COMMANDS", *_definitions(rows)]


def _epilog(context: click.Context) -> list[str]:
    rows = [(str(code), meaning) for code, meaning in EXITS]
    return [".SH EXIT STATUS", *_definitions(rows)] if context.parent is None else []


def _definitions(rows: list[tuple[str, str]]) -> list[str]:
    return [line for term, text in rows for line in (".TP", f".B {_escape(term)}", _escape(text))]


def _escape(text: str) -> str:
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + escaped if escaped.startswith((".", "'")) else escaped
