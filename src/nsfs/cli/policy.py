"""`nsfs policy`: what the daemon's policy decides."""

from __future__ import annotations

import click

from nsfs.cli.options import absolute_reference, json_option
from nsfs.cli.render import render_columns, render_json
from nsfs.cli.session import Session, pass_session
from nsfs.serve import api


@click.group()
def policy() -> None:
    """Ask what the policy decides."""


@policy.command()
@click.argument("reference", metavar="REF")
@click.option("-n", "--namespace", default="default", show_default=True, metavar="NS", help="On whose behalf.")
@click.option("--plugin", default="", metavar="NAME", help="containerd's name for the snapshotter. [a mount by hand]")
@click.option("--label", metavar="SCOPE", help="Of the container: containerd.io/snapshot/nsfs.isolation.")
@click.option("--isolation", metavar="SCOPE", help="As on the command line of a mount by hand.")
@json_option
@pass_session
def explain(
    session: Session,
    reference: str,
    *,
    namespace: str,
    plugin: str,
    label: str | None,
    isolation: str | None,
    as_json: bool,
) -> None:
    """Say which rule decides what the image REF shares with whom, and what follows from that."""
    request = api.ExplainRequest(
        reference=absolute_reference(reference), namespace=namespace, plugin=plugin, label=label, isolation=isolation
    )
    report = session.call("Explain", request, api.ExplainReport)
    click.echo(render_json(report) if as_json else "\n".join(_render(report)))


def _render(report: api.ExplainReport) -> list[str]:
    rows = [
        ("image", report.reference),
        ("scope", report.scope),
        ("domain", report.domain or "none"),
        ("decided by", report.rule),
        *(("" if number else "because", reason) for number, reason in enumerate(report.reasons)),
        ("policy", report.policy or "no file"),
        *report.follows.items(),
        *(("" if number else "shared with", sharer) for number, sharer in enumerate(report.sharers)),
    ]
    return render_columns([(f"{name}:" if name else "", value) for name, value in rows])
