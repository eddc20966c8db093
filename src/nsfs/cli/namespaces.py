"""`nsfs ns`: what is here on behalf of each namespace, and how all of it ends."""

from __future__ import annotations

import click

from nsfs.cli.options import json_option
from nsfs.cli.render import render_columns, render_json
from nsfs.cli.session import Session, pass_session
from nsfs.model.report import Cost, render_count, render_size
from nsfs.serve import api

_HEAD = ("NAMESPACE", "DOMAINS", "MOUNTS", "SNAPSHOTS", "CONTAINERS", "OWN", "QUOTA", "SHARED", "FETCHED")
_COST_HEAD = ("ASKED", "REQUESTS", "RECEIVED")
_DOMAIN_HEAD = ("DOMAIN", "WHOSE", "UID", "KEY", "PID", "DISK", "USED", "QUOTA", "FETCHED", "GRANTS", "STATE")


@click.group()
def ns() -> None:
    """Show what is here on behalf of each namespace, or end it."""


@ns.command()
@json_option
@pass_session
def ls(session: Session, *, as_json: bool) -> None:
    """List the namespaces that have anything here."""
    report = session.call("Namespaces", api.Empty(), api.NamespacesReport)
    if as_json:
        click.echo(render_json(report))
    elif report.namespaces:
        rows = [_HEAD, *map(_row, report.namespaces)]
        click.echo("\n".join(render_columns(rows, frozenset(range(1, len(_HEAD))))))
    else:
        click.echo("no namespaces")


@ns.command()
@click.argument("namespace", metavar="NS")
@json_option
@pass_session
def show(session: Session, namespace: str, *, as_json: bool) -> None:
    """Show what the namespace NS has: domains, mounts, snapshots, bytes."""
    report = session.call("Namespace", api.NamespaceRequest(namespace=namespace), api.NamespaceReport)
    click.echo(render_json(report) if as_json else "\n".join(_render(report)))


@ns.command()
@click.argument("namespace", metavar="NS")
@click.option("--force", is_flag=True, help="Though somebody uses it: its mounts and containers lose their files.")
@json_option
@pass_session
def rm(session: Session, namespace: str, *, force: bool, as_json: bool) -> None:
    """End the namespace NS whole: mounts, snapshots, credentials, pools and their keys."""
    request = api.NamespaceRequest(namespace=namespace, force=force)
    ended = session.call("EndNamespace", request, api.NamespaceEnded)
    if as_json:
        click.echo(render_json(ended))
    went = f"{render_count(len(ended.domains), 'domain')} of {render_size(ended.freed)}"
    session.talk.note(f"namespace {ended.namespace} has ended: {went}, {render_count(ended.snapshots, 'snapshot')}")
    if ended.snapshots:
        session.talk.note(f"containerd still lists what stood on them: ctr -n {ended.namespace} images ls")


def _row(report: api.NamespaceReport) -> tuple[str, ...]:
    counts = (len(report.domains), len(report.mounts), report.snapshots, len(report.containers))
    quota = render_size(report.quota) if report.quota else "-"
    sizes = (render_size(report.own), quota, render_size(report.shared), render_size(report.fetched))
    return (report.namespace or "(none)", *map(str, counts), *sizes)


def _render(report: api.NamespaceReport) -> list[str]:
    rows = [_DOMAIN_HEAD, *map(_domain_row, report.domains)]
    return [
        *render_columns([_HEAD, _row(report)], frozenset(range(1, len(_HEAD)))),
        "",
        *(render_columns(rows, frozenset({2, 4, 5, 6, 7, 8, 9})) if report.domains else ["no domains"]),
        *(["", "mounts:", *(f"  {target}" for target in report.mounts)] if report.mounts else []),
        *(["", "containers:", *(f"  {key}" for key in report.containers)] if report.containers else []),
        *(["", "logged in:", *(f"  {owner}" for owner in report.logins)] if report.logins else []),
        *(
            ["", *render_columns([_COST_HEAD, *map(_cost_row, report.costs)], frozenset({1, 2}))]
            if report.costs
            else []
        ),
    ]


def _cost_row(cost: Cost) -> tuple[str, ...]:
    return (cost.server, str(cost.requests), render_size(cost.received))


def _domain_row(domain: api.NamespaceDomain) -> tuple[str, ...]:
    whose = ("its own" if domain.own else "shared", str(domain.uid), "yes" if domain.encrypted else "none")
    quota = render_size(domain.quota) if domain.quota else "-"
    sizes = (render_size(domain.disk), render_size(domain.used), quota, render_size(domain.fetched))
    return (domain.name, *whose, str(domain.pid or "-"), *sizes, str(domain.grants), domain.state)
