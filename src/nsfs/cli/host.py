"""`nsfs serve`, `doctor`, `completion` and `man`: about this machine, not about images."""

from __future__ import annotations

import os
import sys

import click
import msgspec
from click.shell_completion import get_completion_class

from nsfs import __version__
from nsfs.cli.manual import render_pages
from nsfs.cli.options import json_option
from nsfs.cli.render import render_columns, render_json
from nsfs.cli.session import Session, pass_session
from nsfs.errors import DeniedError, UnsupportedError, UsageError
from nsfs.model.report import render_count
from nsfs.serve.config import SYSTEM_CONFIG, Config, load_config, load_private_config, load_system_config
from nsfs.serve.logs import start_logging
from nsfs.serve.policy_file import load_policy


@click.command()
@click.option("--config", "path", metavar="FILE", type=click.Path(), help=f"Configuration. [{SYSTEM_CONFIG}]")
@click.option("--check", is_flag=True, help="Only say whether the configuration is right.")
@click.option("--private", is_flag=True, hidden=True, help="Serve one user, and end with the last mount.")
@json_option
@pass_session
def serve(session: Session, path: str | None, *, check: bool, private: bool, as_json: bool) -> None:
    """Run the daemon in the foreground."""
    config = _with_options(_load(path, private=private), session)
    if as_json:
        click.echo(render_json(config))
    if check:
        _check_host(config, private=private)
        policy = load_policy(config)
        session.talk.note(f"the configuration is right: {path or SYSTEM_CONFIG}")
        if config.policy:
            session.talk.note(f"the policy is right, {render_count(len(policy.rules), 'rule')}: {config.policy}")
        return
    from nsfs import daemon  # noqa: PLC0415  trio, lmdb and pyfuse3, which no other command needs

    start_logging(config.log_format, config.log_level)
    daemon.run(config, private=private)


def _check_host(config: Config, *, private: bool) -> None:
    """What the file says of this host; raises NsfsError."""
    from nsfs.serve.terms import check_namespaces, check_uids  # noqa: PLC0415  trio, which no other command needs

    if not private:
        check_uids(config)
        check_namespaces(config)


def _load(path: str | None, *, private: bool) -> Config:
    if private and path is not None:
        raise UsageError("--private and --config exclude each other")
    if private:
        return load_private_config(os.environ, os.geteuid())
    return load_config(path) if path is not None else load_system_config()


def _with_options(config: Config, session: Session) -> Config:
    """What the command line says goes before what the file says."""
    said = {"socket": session.socket, "log_format": session.log_format, "log_level": session.log_level}
    return msgspec.structs.replace(config, **{key: value for key, value in said.items() if value is not None})


@click.command()
@click.option("--config", "path", metavar="FILE", type=click.Path(), help=f"Configuration. [{SYSTEM_CONFIG}]")
@json_option
def doctor(path: str | None, *, as_json: bool) -> None:
    """Try what nsfs needs of this kernel and host: what is there, what is used, what is lost without it."""
    from nsfs.serve.doctor import examine  # noqa: PLC0415

    if path is None and os.geteuid() != 0:
        config = load_private_config(os.environ, os.geteuid())
    else:
        config = _load(path, private=False)
    report = examine(config, os.environ, os.geteuid())
    if as_json:
        click.echo(render_json(report))
    else:
        click.echo(f"Linux {report.kernel}, {'root' if report.uid == 0 else f'uid {report.uid}'}\n")
        rows = [(f.name, f.present, "used" if f.used else "-", f.without, f.detail) for f in report.features]
        click.echo("\n".join(render_columns([("FEATURE", "PRESENT", "USED", "LOST WITHOUT IT", "SEEN"), *rows])))
    if not report.usable:
        raise UnsupportedError(f"nsfs cannot work here: {', '.join(report.missing)}")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell: `source <(nsfs completion bash)`."""
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "nsfs", "_NSFS_COMPLETE").source())


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False))
@click.pass_context
def man(ctx: click.Context, directory: str) -> None:
    """Write the manual pages into DIR, for MANPATH/man1."""
    root = ctx.find_root().command
    assert isinstance(root, click.Group)
    try:
        os.makedirs(directory, exist_ok=True)
        for name, text in render_pages(root, __version__).items():
            with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise DeniedError(f"not written: {error.filename}: {error.strerror}") from None
    print(*sorted(render_pages(root, __version__)), sep="\n", file=sys.stderr)
