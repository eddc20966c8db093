"""`nsfs inspect`, `evict` and `status`: about whole images and the daemon that has them."""

from __future__ import annotations

import click

from nsfs.cli import render
from nsfs.cli.options import Choice, image_options, json_option
from nsfs.cli.session import Session, pass_session
from nsfs.model.report import ImageReport, render_count, render_size
from nsfs.serve import api


@click.command()
@click.argument("reference", metavar="REF")
@image_options
@json_option
@pass_session
def inspect(session: Session, reference: str, *, choice: Choice, as_json: bool) -> None:
    """Show an image's layers: sizes, whether each is lazy or why not, and what it is verified against."""
    report = session.call("Inspect", choice.image(reference), ImageReport)
    click.echo(render.render_json(report) if as_json else "\n".join(render.render_image(report)))


@click.command()
@click.argument("reference", metavar="REF")
@image_options
@json_option
@pass_session
def evict(session: Session, reference: str, *, choice: Choice, as_json: bool) -> None:
    """Drop an image's content from the pool; what is read again comes back by ranges."""
    report = session.call("Evict", choice.image(reference), api.EvictReport)
    if as_json:
        click.echo(render.render_json(report))
    session.talk.note(f"freed {render_size(report.freed)} of {render_count(report.layers, 'layer')}")


@click.command()
@json_option
@pass_session
def status(session: Session, *, as_json: bool) -> None:
    """Show mounts and domains: files, bytes of the image, bytes local, bytes fetched."""
    report = session.call("Status", api.Empty(), api.StatusReport)
    click.echo(render.render_json(report) if as_json else "\n".join(render.render_status(report)))
