from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from nsfs.cli.app import nsfs
from nsfs.cli.exits import EXITS
from nsfs.serve import doctor
from nsfs.serve.config import parse_config
from nsfs.serve.doctor import FEATURES, PROBES, DoctorReport, Finding, examine, is_shared, judge, parse_release

_README = (Path(__file__).parents[2] / "README.md").read_text()
ALL = {feature.name: Finding(present=True) for feature in FEATURES}
DEFAULT = parse_config("")


def _used(report: DoctorReport) -> set[str]:
    return {row.name for row in report.features if row.used}


def _left() -> list[str]:
    """Mounts of what it tries; other tests mount beside it."""
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "nsfs-doctor" in line]


def test_every_feature_has_a_probe() -> None:
    assert [feature.name for feature in FEATURES] == list(PROBES)


def test_the_readme_has_every_feature_of_the_kernel() -> None:
    for feature in FEATURES:
        if feature.since:
            assert f"| {feature.name} | {feature.since} | {feature.without} |" in _README, feature


def test_the_readme_has_every_exit_code() -> None:
    for code, meaning in EXITS:
        assert f"| {code} | {meaning} |" in _README


def test_this_host_is_fit_and_trying_leaves_nothing(tmp_path: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    config = parse_config(f"root = '{tmp_path}/not/made/yet'")
    report = examine(config, os.environ, 0)
    assert report.usable, report.missing
    found = {row.name: row.present for row in report.features}
    assert found["idmapped mounts"] == found["user namespaces"] == "yes"
    assert found["erofs"] == found["overlayfs"] == found["memfd"] == found["punched holes"] == "yes"
    assert _left() == []
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_user_is_told_by_version(tmp_path: Path) -> None:
    report = examine(parse_config(f"root = '{tmp_path}'"), {}, 1000)
    rows = {row.name: row for row in report.features}
    assert "by version" in rows["erofs from files"].detail
    assert not rows["erofs from files"].used
    assert rows["fusermount3"].needed


def test_root_uses_what_is_there() -> None:
    used = _used(judge(ALL, DEFAULT, "6.18", 0))
    assert {"erofs from files", "FUSE_NOTIFY_RESEND"} <= used
    assert {"loop devices", "fusermount3"}.isdisjoint(used)


@pytest.mark.parametrize(
    ("key", "gone"),
    [
        ("erofs", {"erofs", "erofs from files", "erofs directio"}),
        ("file_backed", {"erofs from files", "erofs directio"}),
        ("directio", {"erofs directio"}),
        ("resend", {"FUSE_NOTIFY_RESEND"}),
        ("idmap", {"idmapped mounts", "user namespaces"}),
    ],
)
def test_what_is_turned_off_is_not_used(key: str, gone: set[str]) -> None:
    config = parse_config(f"[kernel]\n{key} = false")
    assert _used(judge(ALL, DEFAULT, "6.18", 0)) - _used(judge(ALL, config, "6.18", 0)) == gone


def test_loop_devices_stand_in_for_files() -> None:
    without = ALL | {"erofs from files": Finding(present=False)}
    assert "loop devices" in _used(judge(without, DEFAULT, "6.1", 0))
    neither = without | {"erofs": Finding(present=False)}
    assert "loop devices" not in _used(judge(neither, DEFAULT, "5.10", 0))


@pytest.mark.parametrize("feature", [f for f in FEATURES if f.needed], ids=lambda f: f.name)
def test_without_what_is_needed_nothing_works(feature: object) -> None:
    name = getattr(feature, "name", "")
    reports = [judge(ALL | {name: Finding(present=False)}, DEFAULT, "6.18", uid) for uid in (0, 1000)]
    assert [report.missing for report in reports] == ([[], [name]] if name == "fusermount3" else [[name], [name]])
    unknown = judge(ALL | {name: Finding(present=None)}, DEFAULT, "6.18", 1000)
    assert unknown.usable


def test_releases() -> None:
    assert parse_release("6.18.44-fc-v595") == (6, 18)
    assert parse_release("6.9") < parse_release("6.12-rc1")
    assert parse_release("5.10.0-28-amd64") == (5, 10)
    assert parse_release("weird") == (0, 0)


def test_shared_propagation() -> None:
    mountinfo = (
        "21 1 8:1 / / rw shared:1 - ext4 /dev/a rw\n"
        "22 21 0:5 / /run rw,nosuid - tmpfs tmpfs rw\n"
        "23 22 0:6 / /run/with\\040space rw shared:7 master:2 - tmpfs tmpfs rw\n"
    )
    assert is_shared(mountinfo, "/var/lib/nsfs")
    assert not is_shared(mountinfo, "/run/nsfs")
    assert not is_shared(mountinfo, "/run")
    assert is_shared(mountinfo, "/run/with space/nsfs")
    assert is_shared(mountinfo, "/runner")


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(nsfs, ["doctor"])
    assert result.exit_code == 0, result.output
    for feature in FEATURES:
        assert feature.name in result.output
    assert CliRunner().invoke(nsfs, ["doctor", "--json"]).stdout.startswith('{\n  "kernel"')
    monkeypatch.setitem(PROBES, "memfd", lambda _host: Finding(present=False))
    result = CliRunner().invoke(nsfs, ["doctor"])
    assert result.exit_code == 9
    assert "nsfs cannot work here: memfd" in result.stderr


def test_owners_of_views_over_loop_devices_can_be_shifted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_stack: object, _directory: str) -> str:
        raise OSError(errno.ENOTBLK, "block device required")

    monkeypatch.setattr(doctor, "_mount_view", refuse)
    report = examine(parse_config(f"root = '{tmp_path}'"), os.environ, 0)
    found = {row.name: row.present for row in report.features}
    assert (found["erofs from files"], found["idmapped mounts"]) == ("no", "yes")
    assert _left() == []
