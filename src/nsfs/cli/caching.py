"""`nsfs cache`, `pin`, `unpin` and `offline`: what is kept on this host, and what needs no registry."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from nsfs.cli.options import Choice, image_options, json_option
from nsfs.cli.render import render_columns, render_json, render_pools
from nsfs.cli.session import Session, pass_session
from nsfs.errors import UnreachableError, UsageError
from nsfs.model.report import render_count, render_size
from nsfs.serve import api
from nsfs.serve.config import Duration

if TYPE_CHECKING:
    from nsfs.model.cache import CachedImage

_HEAD = ("IMAGE", "DOMAIN", "LOCAL", "OF", "USED", "STATE")


@click.group()
def cache() -> None:
    """Show what the pools hold, or have some of it go."""


@cache.command()
@json_option
@pass_session
def ls(session: Session, *, as_json: bool) -> None:
    """List the images that have contents in the pools, the one used last first."""
    report = session.call("Cache", api.Empty(), api.CacheReport)
    if as_json:
        click.echo(render_json(report))
        return
    click.echo(render_pools(report))
    if report.images:
        now = time.time()
        rows = [_HEAD, *(_row(image, now) for image in report.images)]
        click.echo("\n".join(render_columns(rows, frozenset({2, 3}))))


def _row(image: CachedImage, now: float) -> tuple[str, ...]:
    state = " ".join(word for word, holds in (("mounted", image.mounted), ("pinned", image.pinned)) if holds)
    ago = f"{max(0, now - image.used) / 3600:.1f} h ago"
    return image.reference, image.domain, render_size(image.local), render_size(image.size), ago, state or "idle"


@cache.command()
@click.option("--older", default="0s", metavar="DURATION", help="Used last so long ago, such as 12h or 7d. [all]")
@click.option("--dry-run", is_flag=True, help="Say what would go.")
@json_option
@pass_session
def prune(session: Session, older: str, *, dry_run: bool, as_json: bool) -> None:
    """Have contents go that are neither mounted nor pinned; what is read again comes back by ranges."""
    request = api.PruneRequest(older=_seconds(older), dry_run=dry_run)
    report = session.call("Prune", request, api.PruneReport)
    if as_json:
        click.echo(render_json(report))
    verb = "would free" if dry_run else "freed"
    session.talk.note(f"{verb} {render_size(report.freed)} of {render_count(report.layers, 'layer')}")


def _seconds(text: str) -> float:
    try:
        return Duration.parse(text).real
    except ValueError as error:
        raise UsageError(f"--older: {error}") from None


@click.command()
@click.argument("reference", metavar="REF")
@image_options
@json_option
@pass_session
def pin(session: Session, reference: str, *, choice: Choice, as_json: bool) -> None:
    """Complete an image in the background, and keep it until `nsfs unpin`."""
    report = session.call("Pin", choice.image(reference), api.PinReport)
    if as_json:
        click.echo(render_json(report))
    left = f"{render_size(report.absent)} are still to come" if report.absent else "all of it is here"
    session.talk.note(f"pinned {report.reference}: {left}")


@click.command()
@click.argument("reference", metavar="REF")
@image_options
@json_option
@pass_session
def unpin(session: Session, reference: str, *, choice: Choice, as_json: bool) -> None:
    """Let an image's contents go again when room runs short."""
    report = session.call("Unpin", choice.image(reference), api.PinReport)
    if as_json:
        click.echo(render_json(report))
    session.talk.note(f"no longer pinned: {report.reference}")


@click.command()
@click.argument("reference", metavar="REF")
@image_options
@json_option
@pass_session
def offline(session: Session, reference: str, *, choice: Choice, as_json: bool) -> None:
    """Say whether an image would run without its registry, and what is missing; exit code 5 if it would not."""
    report = session.call("Offline", choice.image(reference), api.OfflineReport)
    if as_json:
        click.echo(render_json(report))
    else:
        click.echo("\n".join([f"complete: {report.reference}"] if report.complete else report.missing))
    if not report.complete:
        raise UnreachableError(
            f"it would want its registry: {report.reference}", hint=f"nsfs pin {reference} completes it"
        )
