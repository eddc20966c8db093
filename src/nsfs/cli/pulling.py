"""`nsfs pull`."""

from __future__ import annotations

from collections import Counter

import click

from nsfs.cli.options import json_option
from nsfs.cli.render import render_json
from nsfs.cli.session import Session, pass_session
from nsfs.model.report import render_count
from nsfs.serve.config import load_system_config


@click.command()
@click.argument("reference", metavar="REF")
@click.option(
    "-n",
    "--namespace",
    default="default",
    show_default=True,
    metavar="NS",
    envvar="CONTAINERD_NAMESPACE",
    help="Of containerd.",
)
@click.option(
    "--snapshotter",
    default="nsfs",
    show_default=True,
    metavar="NAME",
    envvar="CONTAINERD_SNAPSHOTTER",
    help="Of containerd; not only ours.",
)
@click.option(
    "--containerd",
    "address",
    metavar="SOCKET",
    envvar="CONTAINERD_ADDRESS",
    help="Of which containerd. [containerd.address of the configuration]",
)
@click.option("--platform", metavar="P", help="os/architecture[/variant]. [the host's]")
@json_option
@pass_session
def pull(
    session: Session,
    reference: str,
    *,
    namespace: str,
    snapshotter: str,
    address: str | None,
    platform: str | None,
    as_json: bool,
) -> None:
    """Pull the image REF into containerd, fetching only what its snapshotter cannot show without.

    Afterwards it is an image like any other: to ctr, to Kubernetes, to garbage collection. The environment variables
    are those of ctr: CONTAINERD_ADDRESS, CONTAINERD_NAMESPACE, CONTAINERD_SNAPSHOTTER.
    """
    from nsfs import pull as pulling  # noqa: PLC0415  trio, httpx and grpc take long to import

    config = load_system_config()
    report = pulling.run(
        reference,
        config,
        session.talk,
        socket=(address or config.containerd.address).removeprefix("unix://"),
        namespace=namespace,
        snapshotter=snapshotter,
        platform_name=platform,
    )
    if as_json:
        click.echo(render_json(report))
    counts = Counter(layer.how for layer in report.layers)
    said = ", ".join(f"{counts[how]} {how}" for how in ("lazy", "unpacked", "present") if counts[how])
    session.talk.note(
        f"{report.reference} is in {report.namespace}: {render_count(len(report.layers), 'layer')}, {said}"
    )
