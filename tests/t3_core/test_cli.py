"""The commands against a daemon that answers from a script."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from click.testing import CliRunner

from nsfs import __version__
from nsfs.cli.app import Root, nsfs
from nsfs.cli.exits import EXITS
from nsfs.errors import ERRORS, CorruptError, NotFoundError, NsfsError
from nsfs.model.report import Data, EntryReport, ImageReport, Item, LayerReport, Note, Progress
from nsfs.serve import api

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from click.testing import Result


class FakeDaemon:
    """Remembers requests; `answers` by method: events, then a result, or an exception."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, Any]] = []
        self.answers: dict[str, list[Any]] = {}
        self.asked: str | None = None

    def call(self, method: str, request: msgspec.Struct, kind: type, listen: Callable[[Any], None]) -> Any:
        assert type(request) is api.METHODS[method][0]
        assert kind is api.METHODS[method][1]
        self.requests.append((method, request))
        *events, result = self.answers.get(method, [api.Empty()])
        for event in events:
            listen(event)
        if isinstance(result, BaseException):
            raise result
        return result


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> FakeDaemon:
    fake = FakeDaemon()

    @contextmanager
    def open_daemon(path: str | None, _environ: object, _uid: int) -> Iterator[FakeDaemon]:
        fake.asked = path
        yield fake

    monkeypatch.delenv("NSFS_SOCKET", raising=False)
    monkeypatch.setattr("nsfs.cli.locate.open_daemon", open_daemon)
    return fake


def run(*arguments: str) -> Result:
    return CliRunner().invoke(nsfs, arguments)


def entry(path: bytes, kind: str = "file", **fields: Any) -> EntryReport:
    base: dict[str, Any] = {
        "mode": 0o644,
        "uid": 0,
        "gid": 0,
        "size": 3,
        "mtime_ns": 1_700_000_000_123_456_789,
        "links": 1,
    }
    return EntryReport(path=path, kind=kind, **(base | fields))


POOLS = api.PoolsReport(used=1 << 20, cap=1 << 30, free=1 << 29, reserve=1 << 10, state="ready")
MOUNTED = api.MountReport(
    id="m1",
    target="/mnt",
    reference="docker.io/library/python:3.12",
    digest="sha256:" + "a" * 64,
    namespace="default",
    domain="ns/default",
    driver="erofs",
    writable=False,
    files=5000,
    size=3 << 20,
    local=1 << 20,
    fetched=1 << 19,
    state="ready",
)

LAYER = LayerReport(
    digest="sha256:" + "b" * 64,
    media_type="application/vnd.oci.image.layer.v1.tar+gzip",
    size=1000,
    diff_id="sha256:" + "c" * 64,
    format="tar+gzip",
    lazy=False,
    why="its index is not made yet",
    verified="blob digest and diff ID",
    indexed=True,
    stream_size=3000,
    files=7,
    local=2048,
)


def test_version() -> None:
    assert run("--version").output == f"nsfs {__version__}\n"


def test_help_shows_every_command_and_every_exit_code() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert isinstance(nsfs, Root)
    for name in nsfs.list_commands(None):  # type: ignore[arg-type]
        assert f"\n  {name}" in result.output
    for code, meaning in EXITS:
        assert f"{code}" in result.output
        assert meaning.split(":", maxsplit=1)[0] in result.output


def test_every_error_has_its_exit_code_in_the_table() -> None:
    assert {error.exit_code for error in ERRORS.values()} | {0, 1, 130} == {code for code, _ in EXITS}


@pytest.mark.parametrize("error", [cls("it is so: x", hint="do that") for cls in ERRORS.values()], ids=list(ERRORS))
def test_an_error_of_the_daemon_ends_with_its_code(daemon: FakeDaemon, error: NsfsError) -> None:
    daemon.answers["Status"] = [error]
    result = run("status")
    assert result.exit_code == error.exit_code
    assert result.stdout == ""
    assert result.stderr == "nsfs: it is so: x\nhint: do that\n"


def test_an_unexpected_error_is_a_bug(daemon: FakeDaemon) -> None:
    daemon.answers["Status"] = [ZeroDivisionError()]
    assert run("status").exit_code == 1


def test_an_interrupt_is_quiet(daemon: FakeDaemon) -> None:
    daemon.answers["Status"] = [KeyboardInterrupt()]
    result = run("status")
    assert (result.exit_code, result.output) == (130, "")


@pytest.mark.parametrize("arguments", [["mont"], ["--nope"], ["mount"], ["ls"], ["completion", "tcsh"], ["ls", ":/x"]])
def test_misuse_is_2_in_one_line_with_a_hint(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    first, second = result.stderr.splitlines()
    assert first.startswith("nsfs: ")
    assert second.startswith("hint: ")


def test_errors_as_json(daemon: FakeDaemon) -> None:
    daemon.answers["Status"] = [CorruptError("bad")]
    line = json.loads(run("--log-format", "json", "status").stderr)
    assert line == {"level": "error", "message": "bad", "hint": None, "code": "DATA_LOSS", "exit_code": 6}


def test_the_socket_is_chosen_by_option_or_environment(daemon: FakeDaemon) -> None:
    daemon.answers["Status"] = [
        api.StatusReport(version="1", private=True, root="/r", pools=POOLS, mounts=[], domains=[])
    ]
    run("--socket", "/s", "status")
    assert daemon.asked == "/s"
    CliRunner().invoke(nsfs, ["status"], env={"NSFS_SOCKET": "/t"})
    assert daemon.asked == "/t"
    run("status")
    assert daemon.asked is None


def test_mount_passes_everything_on(daemon: FakeDaemon, tmp_path: Path) -> None:
    daemon.answers["Mount"] = [MOUNTED]
    options = ["--rw", "--driver", "fuse", "--namespace", "a", "--isolation", "pod", "--platform", "linux/arm64"]
    result = run("mount", "python:3.12", str(tmp_path), *options, "--on-error", "eio", "--profile", "record", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == msgspec.to_builtins(MOUNTED)
    assert daemon.requests == [
        (
            "Mount",
            api.MountRequest(
                reference="python:3.12",
                target=str(tmp_path),
                driver="fuse",
                writable=True,
                namespace="a",
                isolation="pod",
                platform="linux/arm64",
                on_error="eio",
                profile="record",
            ),
        )
    ]


def test_mount_leaves_the_daemon_its_choices(daemon: FakeDaemon) -> None:
    daemon.answers["Mount"] = [MOUNTED]
    result = run("mount", "a", "/mnt")
    assert daemon.requests == [("Mount", api.MountRequest(reference="a", target="/mnt"))]
    assert result.stdout == ""
    assert "5000 files, 3.0 MiB, 1.0 MiB of it local, driver erofs" in result.stderr


def test_targets_and_layouts_are_absolute(daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.answers["Mount"] = [MOUNTED]
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    run("mount", "oci:images/x:tag", "link/")
    run("umount", "link", "--force")
    (_, mounted), (_, gone) = daemon.requests
    assert mounted.reference == f"oci:{tmp_path}/images/x:tag"
    assert mounted.target == f"{tmp_path}/real"
    assert gone == api.UmountRequest(target=f"{tmp_path}/real", force=True)


def test_a_mount_in_the_foreground_ends_with_a_signal(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.answers["Mount"] = [MOUNTED]

    def wait(event: threading.Event) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return event.is_set()

    monkeypatch.setattr("threading.Event.wait", wait)
    result = run("mount", "a", "/mnt", "--foreground")
    assert result.exit_code == 0, result.output
    assert daemon.requests[1] == ("Umount", api.UmountRequest(target="/mnt"))


def test_a_foreground_mount_that_somebody_else_unmounted(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.answers = {"Mount": [MOUNTED], "Umount": [NotFoundError("no")]}
    monkeypatch.setattr("threading.Event.wait", lambda _event: True)
    result = run("mount", "a", "/mnt", "--foreground")
    assert result.exit_code == 0
    assert "nothing is left to unmount: /mnt" in result.stderr


def test_a_foreground_mount_that_is_interrupted_when_it_is_made_is_taken_away(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_method: str, *_arguments: object) -> None:
        if _method == "Umount":
            daemon.requests.append((_method, _arguments[0]))
            raise NotFoundError("no")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(daemon, "call", interrupt)
    result = run("mount", "a", "/mnt", "--foreground")
    assert result.exit_code == 130
    assert daemon.requests == [("Umount", api.UmountRequest(target="/mnt"))]


def test_notes_and_progress_go_to_stderr_as_lines(daemon: FakeDaemon) -> None:
    daemon.answers["Read"] = [
        Note(text="fetching 12.0 MiB"),
        Progress(stage="index", what="sha256:1234", done=0, total=2048),
        Progress(stage="index", what="sha256:1234", done=1024, total=2048),
        Data(b"\x00\xff"),
        Progress(stage="index", what="sha256:1234", done=2048, total=2048),
        Progress(stage="index", what="sha256:1234", done=2048, total=2048),
        Data(b"\n"),
        api.Empty(),
    ]
    result = run("cat", "a:/x")
    assert result.stdout_bytes == b"\x00\xff\n"
    assert result.stderr.splitlines() == [
        "fetching 12.0 MiB",
        "index sha256:1234: 0 B of 2.0 KiB",
        "index sha256:1234: 2.0 KiB, done",
    ]


def test_quiet_is_quiet(daemon: FakeDaemon) -> None:
    daemon.answers["Read"] = [Note(text="x"), Progress(stage="s", what="w"), api.Empty()]
    for form in ("text", "json"):
        assert run("--log-level", "error", "--log-format", form, "cat", "a:/x").stderr == ""


def test_talk_as_json(daemon: FakeDaemon) -> None:
    half = Progress(stage="s", what="w", done=1, total=2)
    daemon.answers["Read"] = [Note(text="x"), half, half, api.Empty()]
    lines = [json.loads(line) for line in run("--log-format", "json", "cat", "a:/x").stderr.splitlines()]
    assert len(lines) == 2
    assert lines[0] == {"level": "info", "message": "x"}
    assert lines[1] == {"level": "info", "message": "progress", "stage": "s", "what": "w", "done": 1, "total": 2}


def test_cat_of_several_in_order(daemon: FakeDaemon) -> None:
    daemon.answers["Read"] = [Data(b"1"), api.Empty()]
    assert run("cat", "a:/x", "oci:/l:t:/y").stdout == "11"
    assert [(r.reference, r.path) for _, r in daemon.requests] == [("a", b"/x"), ("oci:/l:t", b"/y")]


def test_cat_wants_a_path(daemon: FakeDaemon) -> None:
    result = run("cat", "python:3.12")
    assert (result.exit_code, daemon.requests) == (2, [])


def test_ls(daemon: FakeDaemon) -> None:
    daemon.answers["List"] = [
        Item(entry(b"/etc/\xff\x1b[1m")),
        Item(entry(b"/etc/a", "symlink", target=b"/b", mode=0o777)),
        Item(entry(b"/etc/.d", "directory", links=2, mode=0o1777, uid=1000)),
        Item(entry(b"/etc/null", "character", device=(1, 3), size=0, mode=0o666)),
        api.Empty(),
    ]
    assert run("ls", "img:/etc/").stdout.splitlines() == [".d", "a", "null", r"\xff\x1b[1m"]
    assert run("ls", "-l", "img:/etc").stdout.splitlines() == [
        "drwxrwxrwt  2  1000  0     3  2023-11-14 22:13  .d",
        "lrwxrwxrwx  1     0  0     3  2023-11-14 22:13  a -> /b",
        "crw-rw-rw-  1     0  0  1, 3  2023-11-14 22:13  null",
        r"-rw-r--r--  1     0  0     3  2023-11-14 22:13  \xff\x1b[1m",
    ]


def test_ls_of_several_names_each(daemon: FakeDaemon) -> None:
    daemon.answers["List"] = [Item(entry(b"/etc/a")), api.Empty()]
    assert run("ls", "img", "img:/etc/a").stdout == "img:\netc/a\n\nimg:/etc/a:\na\n"


def test_ls_json_is_one_array_that_keeps_every_byte(daemon: FakeDaemon) -> None:
    item = entry(b"/\xff", xattrs={b"user.x": b"\x00\x80"}, device=(0, 0))
    daemon.answers["List"] = [Item(item), api.Empty()]
    listed = json.loads(run("ls", "--json", "a", "b").stdout)
    assert [e["path"].encode("utf-8", "surrogateescape") for e in listed] == [b"/\xff"] * 2
    assert listed[0]["xattrs"] == {"user.x": "\x00\udc80"}
    assert listed[0].keys() == msgspec.to_builtins(item).keys()


@pytest.mark.usefixtures("daemon")
def test_an_empty_directory() -> None:
    assert run("ls", "a:/empty").stdout == ""
    assert run("ls", "-l", "a:/empty").stdout == ""
    assert json.loads(run("ls", "--json", "a:/empty").stdout) == []


def test_tree(daemon: FakeDaemon) -> None:
    paths = [b"/d", b"/d/x/y", b"/d/x", b"/d/x-1", b"/d/z", b"/d/z/k"]
    daemon.answers["Tree"] = [*(Item(entry(path)) for path in paths), api.Empty()]
    assert run("tree", "a:/d").stdout.splitlines() == [
        "/d",
        "├── x",
        "│   └── y",
        "├── x-1",
        "└── z",
        "    └── k",
    ]
    assert len(json.loads(run("tree", "--json", "a:/d").stdout)) == 6


def test_tree_of_the_root(daemon: FakeDaemon) -> None:
    daemon.answers["Tree"] = [*(Item(entry(path)) for path in (b"/", b"/b", b"/a", b"/b/c")), api.Empty()]
    assert run("tree", "a").stdout.splitlines() == ["/", "├── a", "└── b", "    └── c"]


def test_stat(daemon: FakeDaemon) -> None:
    daemon.answers["Stat"] = [entry(b"/bin/x", mode=0o4755, layer="sha256:ab", xattrs={b"user.k": b"v\n"})]
    assert run("stat", "a:/bin/x").stdout.splitlines() == [
        "  File: /bin/x",
        "  Size: 3             Links: 1       regular file",
        "Access: (4755/-rwsr-xr-x)  Uid: 0       Gid: 0",
        "Modify: 2023-11-14 22:13:20.123456789 +0000",
        " Layer: sha256:ab",
        r" Xattr: user.k=v\n",
    ]
    assert json.loads(run("stat", "--json", "a:/bin/x").stdout)[0]["mode"] == 0o4755


def test_times_before_and_beyond_every_calendar(daemon: FakeDaemon) -> None:
    daemon.answers["Stat"] = [entry(b"/x", mtime_ns=-1)]
    assert "1969-12-31 23:59:59.999999999" in run("stat", "a:/x").stdout
    daemon.answers["Stat"] = [entry(b"/x", mtime_ns=(1 << 62) * 1000)]
    assert run("stat", "a:/x").exit_code == 0


def test_inspect(daemon: FakeDaemon) -> None:
    report = ImageReport(
        reference="docker.io/library/a:latest",
        digest="sha256:" + "d" * 64,
        platform="linux/amd64",
        size=1000,
        domain="shared",
        layers=[LAYER],
        config={"Env": ["A=b"]},
    )
    daemon.answers["Inspect"] = [report]
    text = run("inspect", "a").stdout
    assert "docker.io/library/a:latest" in text
    assert "no: its index is not made yet" in text
    assert "7 files, 2.0 KiB local" in text
    assert json.loads(run("inspect", "a", "--json").stdout) == msgspec.to_builtins(report)


def test_status(daemon: FakeDaemon) -> None:
    domain = api.DomainReport(
        name="ns/default", pid=0, layers=3, local=0, fetched=1 << 30, waiting=2, state="ready", unkept="disk full"
    )
    report = api.StatusReport(version="1", private=False, root="/r", pools=POOLS, mounts=[MOUNTED], domains=[domain])
    daemon.answers["Status"] = [report]
    text = run("status").stdout
    assert "/mnt" in text
    assert "1.0 GiB" in text
    assert "pools: 1.0 MiB of 1.0 GiB taken, 512.0 MiB free, 1.0 KiB of it in reserve: ready\n" in text
    assert "ready; keeps nothing more: disk full\n" in text
    assert json.loads(run("status", "--json").stdout) == msgspec.to_builtins(report)


def test_evict(daemon: FakeDaemon) -> None:
    daemon.answers["Evict"] = [api.EvictReport(layers=3, freed=5 << 30)]
    assert run("evict", "a").stderr == "freed 5.0 GiB of 3 layers\n"
    daemon.answers["Evict"] = [api.EvictReport(layers=1, freed=5)]
    assert run("evict", "a").stderr == "freed 5 B of 1 layer\n"
    daemon.answers["Evict"] = [api.EvictReport(layers=3, freed=5 << 30)]
    assert json.loads(run("evict", "a", "--json").stdout) == {"layers": 3, "freed": 5 << 30}


def test_umount_json(daemon: FakeDaemon) -> None:
    assert json.loads(run("umount", "/mnt", "--json").stdout)["target"] == "/mnt"
    assert daemon.requests == [("Umount", api.UmountRequest(target="/mnt"))]


def test_serve_check(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[fetch]\nread_ahead = '2MiB'\n")
    result = run("serve", "--config", str(file), "--check", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["fetch"]["read_ahead"] == 2 << 20
    file.write_text("fetsch = 1")
    assert run("serve", "--config", str(file), "--check").exit_code == 2
    assert run("serve", "--config", str(tmp_path / "gone"), "--check").exit_code == 3
    assert run("serve", "--config", str(file), "--private", "--check").exit_code == 2


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("log_level = 'error'\nlog_format = 'json'\n")
    options = ["--log-level", "debug", "--log-format", "text", "--socket", "/s"]
    config = json.loads(run(*options, "serve", "--config", str(file), "--check", "--json").stdout)
    assert (config["log_level"], config["log_format"], config["socket"]) == ("debug", "text", "/s")


EXPLAINED = api.ExplainReport(
    reference="docker.io/library/python:3",
    namespace="team-a",
    plugin="nsfs",
    scope="shared",
    domain="public",
    rule="rule 2 (base images)",
    reasons=["rule 2 (base images): shared in domain public"],
    policy="/etc/nsfs/policy.toml",
    follows={"disk": "one pool"},
    sharers=["rule 2: all", "rule 3: some"],
)


def test_explain(daemon: FakeDaemon) -> None:
    daemon.answers["Explain"] = [EXPLAINED]
    result = run("policy", "explain", "-n", "team-a", "--plugin", "nsfs", "--label", "pod", "python:3")
    assert daemon.requests == [
        ("Explain", api.ExplainRequest(reference="python:3", namespace="team-a", plugin="nsfs", label="pod"))
    ]
    lines = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    assert ["scope:", "shared"] in lines
    assert ["decided", "by:   rule 2 (base images)"] in lines
    assert lines[-1] == ["rule", "3: some"]


def test_explain_as_json(daemon: FakeDaemon) -> None:
    daemon.answers["Explain"] = [EXPLAINED]
    report = json.loads(run("policy", "explain", "--json", "python:3").stdout)
    assert report == msgspec.to_builtins(EXPLAINED)


def test_a_group_without_a_command_shows_its_help() -> None:
    result = run("policy")
    assert result.exit_code == 2
    assert "explain" in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    assert "_NSFS_COMPLETE" in run("completion", shell).stdout


def test_every_command_has_a_manual_page(tmp_path: Path) -> None:
    result = run("man", str(tmp_path / "man1"))
    assert result.exit_code == 0
    assert isinstance(nsfs, Root)
    pages = {path.name: path.read_text() for path in (tmp_path / "man1").iterdir()}
    assert pages.keys() >= {"nsfs.1", *(f"nsfs-{name}.1" for name in nsfs.list_commands(None))}  # type: ignore[arg-type]
    assert "nsfs\\-policy\\-explain(1)" in pages["nsfs-policy.1"]
    assert ".B nsfs policy explain" in pages["nsfs-policy-explain.1"]
    assert r"\-\-on\-error" in pages["nsfs-mount.1"]
    assert "EXIT STATUS" in pages["nsfs.1"]


def test_manual_pages_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert run("man", str(tmp_path / "file/man1")).exit_code == 4


@pytest.mark.parametrize(
    ("output", "code", "said"), [("full", 7, "nsfs: no space left for the output\n"), ("pipe", 141, "")]
)
def test_output_that_nobody_takes(output: str, code: int, said: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "wb") as full:
        stdout = full.fileno() if output == "full" else writer
        command = [sys.executable, "-m", "nsfs.cli", "completion", "zsh"]
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.parametrize("command", ["push", "show", "rm"])
def test_nothing_is_put_beside_images_of_a_layout(daemon: FakeDaemon, command: str) -> None:
    result = run("index", command, "oci:/somewhere")
    assert (result.exit_code, "images of a layout" in result.stderr) == (9, True)
    assert not daemon.requests
