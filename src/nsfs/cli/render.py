"""Reports as text. Pure.

Names from an image are hostile: what is no printable text is shown escaped, so that a file name cannot drive the
terminal. JSON carries bytes that are no UTF-8 as the surrogates U+DC80 to U+DCFF (PEP 383), escaped.
"""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from nsfs.model.report import render_count, render_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from nsfs.core.worker_api import StartReport
    from nsfs.model.report import EntryReport, ImageReport, LayerReport, ProfileReport
    from nsfs.serve import api
    from nsfs.serve.config import Duration, Size

_KINDS = {
    "file": (stat.S_IFREG, "regular file"),
    "directory": (stat.S_IFDIR, "directory"),
    "symlink": (stat.S_IFLNK, "symbolic link"),
    "character": (stat.S_IFCHR, "character special file"),
    "block": (stat.S_IFBLK, "block special file"),
    "fifo": (stat.S_IFIFO, "fifo"),
    "socket": (stat.S_IFSOCK, "socket"),
}


def render_name(name: bytes) -> str:
    """`name` as text that is safe on a terminal."""
    text = name.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def render_columns(rows: Iterable[Sequence[str]], right: frozenset[int] = frozenset()) -> list[str]:
    """Lines of aligned columns, two spaces apart; columns in `right` are right-aligned."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(_pad(cell, i, widths[i], right) for i, cell in enumerate(row)).rstrip() for row in table]


def _pad(cell: str, column: int, width: int, right: frozenset[int]) -> str:
    return cell.rjust(width) if column in right else cell.ljust(width)


def render_mode(entry: EntryReport) -> str:
    """As `ls -l` has it: drwxr-xr-x."""
    return stat.filemode(_KINDS[entry.kind][0] | entry.mode)


def sort_entries(entries: Iterable[EntryReport]) -> list[EntryReport]:
    """Every directory before what is in it, names by their bytes."""
    return sorted(entries, key=lambda entry: entry.path.split(b"/"))


def name_below(path: bytes, directory: bytes) -> bytes:
    """What `ls directory` calls `path`: the rest below it; or, where path lies elsewhere, its last component."""
    prefix = directory.rstrip(b"/") + b"/"
    if path.startswith(prefix) and len(path) > len(prefix):
        return path[len(prefix) :]
    return path.rpartition(b"/")[2] or path


def render_listing(entries: Sequence[tuple[bytes, EntryReport]], *, long: bool) -> list[str]:
    """`ls` (a name a line) or `ls -l` of (name, entry)s."""
    if not long:
        return [render_name(name) for name, _ in entries]
    rows = [(*_long_cells(entry), render_name(name) + _arrow(entry)) for name, entry in entries]
    return render_columns(rows, frozenset({1, 2, 3, 4}))


def _long_cells(entry: EntryReport) -> tuple[str, ...]:
    device = entry.kind in {"character", "block"}
    size = f"{entry.device[0]}, {entry.device[1]}" if device else str(entry.size)
    when = _moment(entry.mtime_ns, "%Y-%m-%d %H:%M")
    return render_mode(entry), str(entry.links), str(entry.uid), str(entry.gid), size, when


def _arrow(entry: EntryReport) -> str:
    return f" -> {render_name(entry.target)}" if entry.kind == "symlink" else ""


def _moment(nanoseconds: int, form: str) -> str:
    """In UTC: an image has no time zone. Years that no calendar has are shown as seconds."""
    try:
        return datetime.fromtimestamp(nanoseconds // 10**9, UTC).strftime(form)
    except (ValueError, OverflowError, OSError):
        return f"@{nanoseconds // 10**9}"


def render_stat(entry: EntryReport) -> list[str]:
    """Lines like those of stat(1)."""
    kind = "regular empty file" if entry.kind == "file" and not entry.size else _KINDS[entry.kind][1]
    device = f"  Device: {entry.device[0]},{entry.device[1]}" if entry.kind in {"character", "block"} else ""
    when = f"{_moment(entry.mtime_ns, '%Y-%m-%d %H:%M:%S')}.{entry.mtime_ns % 10**9:09} +0000"
    lines = [
        f"  File: {render_name(entry.path)}{_arrow(entry)}",
        f"  Size: {entry.size:<12}  Links: {entry.links:<6}  {kind}{device}",
        f"Access: ({entry.mode:04o}/{render_mode(entry)})  Uid: {entry.uid:<6}  Gid: {entry.gid}",
        f"Modify: {when}",
        f" Layer: {entry.layer or '-'}",
    ]
    return lines + [f" Xattr: {render_name(name)}={render_name(value)}" for name, value in sorted(entry.xattrs.items())]


def render_tree(entries: Sequence[EntryReport], root: bytes) -> Iterator[str]:
    """Draw `entries` (in the order of `sort_entries`) as a tree below `root`."""
    yield render_name(root)
    prefix = root.rstrip(b"/") + b"/"
    below = [entry for entry in entries if entry.path.startswith(prefix) and entry.path != prefix]
    paths = [entry.path[len(prefix) :].split(b"/") for entry in below]
    lasts = _find_lasts(paths)
    open_branches: list[bool] = []
    for entry, path, last in zip(below, paths, lasts, strict=True):
        del open_branches[len(path) - 1 :]
        stem = "".join("│   " if more else "    " for more in open_branches)
        yield f"{stem}{'└── ' if last else '├── '}{render_name(path[-1])}{_arrow(entry)}"
        open_branches.append(not last)


def _find_lasts(paths: Sequence[Sequence[bytes]]) -> list[bool]:
    """For each path of a sorted walk, whether it is the last in its directory."""
    lasts = [False] * len(paths)
    seen: list[bool] = []
    for index in range(len(paths) - 1, -1, -1):
        depth = len(paths[index])
        seen += [False] * (depth - len(seen))
        lasts[index] = not seen[depth - 1]
        seen[depth - 1] = True
        del seen[depth:]
    return lasts


def render_image(report: ImageReport) -> list[str]:
    """`nsfs inspect`."""
    head = [
        ("reference", report.reference),
        ("digest", report.digest),
        ("platform", report.platform),
        ("size", f"{render_size(report.size)} in {render_count(len(report.layers), 'layer')}"),
        ("domain", report.domain),
        ("start", _profile(report.profile)),
    ]
    lines = render_columns(head)
    for number, layer in enumerate(report.layers):
        lines += ["", f"layer {number}  {layer.digest}", *(f"  {line}" for line in render_columns(_layer_rows(layer)))]
    return lines


def _profile(profile: ProfileReport | None) -> str:
    if profile is None:
        return "not recorded"
    read = f"{render_size(profile.size)} in {render_count(profile.runs, 'piece')}, within {profile.seconds:.1f} s"
    whole = f"may lack something: {profile.flaw}" if profile.flaw else "complete"
    return f"read {read}, as recorded {_moment(int(profile.recorded * 1e9), '%Y-%m-%d %H:%M:%S')} UTC; {whole}"


def _layer_rows(layer: LayerReport) -> list[tuple[str, str]]:
    whole = f", {render_size(layer.stream_size)} uncompressed" if layer.stream_size else ""
    rows = [
        ("media type", layer.media_type),
        ("size", f"{render_size(layer.size)}{whole}"),
        ("diff ID", layer.diff_id),
        ("format", layer.format),
        ("lazy", f"{'yes' if layer.lazy else 'no'}: {layer.why}"),
        ("verified", layer.verified),
    ]
    if layer.indexed:
        rows.append(("here", f"{render_count(layer.files, 'file')}, {render_size(layer.local)} local"))
    return [(f"{name}:", value) for name, value in rows]


def render_status(report: api.StatusReport) -> list[str]:
    """`nsfs status`."""
    who = "private daemon" if report.private else "daemon"
    lines = [f"{who} {report.version}, state in {report.root}", f"pools: {render_pools(report.pools)}", ""]
    lines += _table(_MOUNT_HEAD, map(_mount_row, report.mounts), "no mounts", frozenset({5, 6, 7, 8}))
    lines += ["", *_table(_DOMAIN_HEAD, map(_domain_row, report.domains), "no domains", frozenset({1, 2, 3, 4, 5}))]
    return lines


def render_pools(pools: api.PoolsReport) -> str:
    """What pools take, and what is left."""
    taken = f"{render_size(pools.used)} of {render_size(pools.cap)} taken"
    return f"{taken}, {render_size(pools.free)} free, {render_size(pools.reserve)} of it in reserve: {pools.state}"


_MOUNT_HEAD = ("MOUNT", "IMAGE", "NAMESPACE", "DOMAIN", "DRIVER", "FILES", "SIZE", "LOCAL", "FETCHED", "STATE")
_DOMAIN_HEAD = ("DOMAIN", "PID", "LAYERS", "LOCAL", "FETCHED", "WAITING", "STATE")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], nothing: str, right: frozenset[int]) -> list[str]:
    body = list(rows)
    return render_columns([head, *body], right) if body else [nothing]


def _mount_row(mount: api.MountReport) -> tuple[str, ...]:
    driver = f"{mount.driver},rw" if mount.writable else mount.driver
    sizes = (str(mount.files), render_size(mount.size), render_size(mount.local), render_size(mount.fetched))
    state = ", ".join(filter(None, (mount.state, _start_state(mount.start), "completing" if mount.completing else "")))
    return (mount.target, mount.reference, mount.namespace, mount.domain, driver, *sizes, state)


def _start_state(start: StartReport | None) -> str:
    """What is done for a start, and how far that is."""
    if start is None:
        return ""
    done = render_size(start.done)
    if start.how == "recorded":
        return f"its start is recorded: {done}"
    how = "by an artifact's pack" if start.how == "pack" else "by its profile"
    return f"fetched ahead {how}: {done} of {render_size(start.total)}"


def _domain_row(domain: api.DomainReport) -> tuple[str, ...]:
    sizes = (render_size(domain.local), render_size(domain.fetched), str(domain.waiting))
    return (domain.name, str(domain.pid or "-"), str(domain.layers), *sizes, _domain_state(domain))


def _domain_state(domain: api.DomainReport) -> str:
    parts = (
        domain.state,
        f"{render_count(domain.recorded, 'start')} recorded now" if domain.recorded else "",
        f"{render_count(domain.prefetching, 'start')} fetched ahead now" if domain.prefetching else "",
        f"keeps nothing more: {domain.unkept}" if domain.unkept else "",
    )
    return "; ".join(filter(None, parts))


def render_json(report: msgspec.Struct, indent: int | None = 2) -> str:
    """One JSON document, with bytes as text (see above); on one line where `indent` is None."""
    return json.dumps(_plain(msgspec.to_builtins(report, builtin_types=(bytes,), enc_hook=_number)), indent=indent)


def _number(value: Size | Duration) -> float:
    return value.real


def _plain(value: Any) -> Any:  # noqa: ANN401  any JSON value
    match value:
        case bytes():
            return value.decode("utf-8", "surrogateescape")
        case dict():
            return {_plain(key): _plain(member) for key, member in value.items()}
        case list() | tuple():
            return [_plain(member) for member in value]
    return value
