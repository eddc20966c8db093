"""`nsfs login` and `nsfs logout`: as whom a namespace asks registries."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from nsfs.cli.options import json_option
from nsfs.cli.render import render_json
from nsfs.cli.session import Session, pass_session
from nsfs.errors import UsageError
from nsfs.serve import api
from nsfs.serve.dumps import forbid_core_dumps

if TYPE_CHECKING:
    from typing import TextIO

_namespace = click.option(
    "-n", "--namespace", default="default", show_default=True, metavar="NS", help="Whose mounts ask as that."
)


@click.command()
@click.argument("registry", metavar="REGISTRY")
@_namespace
@click.option("-u", "--username", metavar="NAME", help="Asked for where it is not given.")
@click.option("--password-stdin", is_flag=True, help="Read the password, or token, from standard input.")
@json_option
@pass_session
def login(
    session: Session, registry: str, *, namespace: str, username: str | None, password_stdin: bool, as_json: bool
) -> None:
    """Have a namespace ask REGISTRY with a name and password of its own, once REGISTRY has accepted them."""
    forbid_core_dumps()
    name = username or _prompt("username")
    password = _read_password(sys.stdin) if password_stdin else _prompt("password", hide=True)
    request = api.LoginRequest(registry=registry, namespace=namespace, username=name, password=password)
    report = session.call("Login", request, api.LoginReport)
    if as_json:
        click.echo(render_json(report))
    session.talk.note(f"namespace {report.namespace} asks {report.registry} as {report.username}")


@click.command()
@click.argument("registry", metavar="REGISTRY")
@_namespace
@json_option
@pass_session
def logout(session: Session, registry: str, *, namespace: str, as_json: bool) -> None:
    """Have a namespace ask REGISTRY as nobody again, as far as `nsfs login` had the say."""
    request = api.LogoutRequest(registry=registry, namespace=namespace)
    session.call("Logout", request, api.Empty)
    if as_json:
        click.echo(render_json(request))


def _prompt(what: str, *, hide: bool = False) -> str:
    if not sys.stdin.isatty():
        raise UsageError(f"no {what}, and nobody to ask for it", hint="--username NAME --password-stdin")
    answer = click.prompt(what, hide_input=hide, err=True)
    assert isinstance(answer, str)
    return answer


def _read_password(stream: TextIO) -> str:
    """One line; its end is no part of it."""
    password = stream.read(1 << 16).removesuffix("\n").removesuffix("\r")
    if not password or "\n" in password:
        raise UsageError("no password on standard input, or more than one line")
    return password
