"""`nsfs index`: what lies beside an image in its registry, so that nodes that never saw it need not read it through."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from nsfs.cli.options import Choice, image_options, json_option
from nsfs.cli.render import render_columns, render_json
from nsfs.cli.session import Session, pass_session
from nsfs.errors import NotFoundError
from nsfs.model.digest import Digest
from nsfs.model.report import render_count, render_size
from nsfs.serve import api
from nsfs.serve.config import load_system_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from nsfs.core.publish import ArtifactReport
    from nsfs.model.report import Data, Item, Part

_HEAD = ("ARTIFACT", "CREATED", "LAYERS", "SIZE", "PACK", "STATE")


def _platform_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option("--platform", metavar="P", help="os/architecture[/variant]. [the host's]")(command)


@click.group()
def index() -> None:
    """Put indexes and a start-up pack beside an image in its registry, or show or remove them."""


@index.command()
@click.argument("reference", metavar="REF")
@image_options
@json_option
@pass_session
def push(session: Session, reference: str, *, choice: Choice, as_json: bool) -> None:
    """Put beside the image REF, which stays as it is, how its plain layers are read and what its start reads.

    What its start reads is known once one was recorded: nsfs mount --profile record. The registry is asked with
    your own credentials, those of docker login.
    """
    from nsfs import artifacts  # noqa: PLC0415  trio and httpx take long to import

    def export(take: Callable[[Data | Item | Part], None]) -> api.ExportReport:
        return session.call("Export", choice.image(reference), api.ExportReport, take)

    name, report = artifacts.push(reference, load_system_config().registry, session.talk, export)
    if as_json:
        click.echo(render_json(report))
    pack = f", a start-up pack of {render_size(report.pack)}" if report.pack else ""
    layers = render_count(len(report.layers), "layer")
    session.talk.note(f"beside {name}: {layers}{pack}, {render_size(report.size)} in all: {report.digest}")


@index.command()
@click.argument("reference", metavar="REF")
@_platform_option
@json_option
def show(reference: str, *, platform: str | None, as_json: bool) -> None:
    """Show what lies beside the image REF, the newest first."""
    from nsfs import artifacts  # noqa: PLC0415  trio and httpx take long to import

    report = artifacts.show(reference, platform, load_system_config().registry)
    if as_json:
        click.echo(render_json(report))
    elif report.artifacts:
        rows = [_HEAD, *map(_row, report.artifacts)]
        click.echo("\n".join(render_columns(rows, frozenset({2, 3, 4}))))
    else:
        click.echo("nothing lies beside it")


def _row(report: ArtifactReport) -> tuple[str, ...]:
    sizes = (str(len(report.layers)), render_size(report.size), render_size(report.pack) if report.pack else "-")
    return (report.digest, report.created or "-", *sizes, report.flaw or "ok")


@index.command()
@click.argument("reference", metavar="REF")
@click.option("--digest", metavar="D", help="Only the artifact with this digest. [all of them]")
@_platform_option
@json_option
@pass_session
def rm(session: Session, reference: str, *, digest: str | None, platform: str | None, as_json: bool) -> None:
    """Take away what lies beside the image REF."""
    from nsfs import artifacts  # noqa: PLC0415  trio and httpx take long to import

    wanted = Digest(digest) if digest else None
    report = artifacts.remove(reference, platform, wanted, load_system_config().registry)
    if wanted and not report.artifacts:
        raise NotFoundError(f"no such artifact lies beside {reference}: {wanted}", hint=f"nsfs index show {reference}")
    if as_json:
        click.echo(render_json(report))
    session.talk.note(f"taken away: {render_count(len(report.artifacts), 'artifact')}")
