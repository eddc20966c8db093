"""The policy file, from its first reading to the domain of a mount."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING

from images import Image, directory, file, gzip_layer, write_oci_layout
from nsfs_daemon import Daemon, run_daemon
from users import wait_until

if TYPE_CHECKING:
    from pathlib import Path

TEAMS = """
[[rule]]
name = "one pool for the teams"
namespace = "team-*"
image = "oci:/**"
scope = "shared"
domain = "teams"
"""


def explained(daemon: Daemon, *arguments: str) -> tuple[str, str]:
    report = daemon.json("policy", "explain", *arguments)
    return report["domain"], report["rule"]


def now_explained(daemon: Daemon, *arguments: str) -> str:
    """The domain; empty while the daemon gives its place to the next."""
    done = daemon.nsfs("policy", "explain", "--json", *arguments, check=False)
    return str(json.loads(done.stdout)["domain"]) if done.returncode == 0 else ""


def test_a_policy_decides_and_may_change(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(TEAMS)
    layout = write_oci_layout(tmp_path / "layout", Image((gzip_layer([directory("a"), file("a/b", b"content")]),)))
    image = f"oci:{layout}"
    with run_daemon(str(tmp_path / "daemon"), {"policy": str(policy)}) as daemon:
        assert explained(daemon, "-n", "team-a", image) == ("teams", "rule 1 (one pool for the teams)")
        assert explained(daemon, "-n", "other", image)[0] == "ns/other"
        assert explained(daemon, "-n", "team-a", "--label", "pod", image)[0] == "pod/<mount>"
        assert explained(daemon, "-n", "k8s.io", "--plugin", "nsfs-team-a", "python")[0] == "ns/k8s.io/team-a"
        assert daemon.nsfs("policy", "explain", "--label", "shared", image, check=False).returncode == 4
        with daemon.mounted(image, str(tmp_path / "mnt"), "--namespace", "team-a") as mount:
            assert mount["domain"] == "teams"
            policy.write_text("[[rule]]")
            os.kill(daemon.pid, signal.SIGHUP)
            wait_until(lambda: "SIGHUP changes nothing: " in daemon.tail(), "a policy that is not right is told of")
            assert explained(daemon, "-n", "team-a", image)[0] == "teams"
            policy.write_text("")
            os.kill(daemon.pid, signal.SIGHUP)
            wait_until(lambda: now_explained(daemon, "-n", "team-a", image) == "ns/team-a", "the new policy")
            assert (tmp_path / "mnt/a/b").read_bytes() == b"content"


def test_check_looks_at_the_policy_too(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(TEAMS)
    (tmp_path / "config.toml").write_text(f'policy = "{policy}"\n')
    daemon = Daemon("/nonexistent", "", "", os.devnull, 0)
    check = ("serve", "--check", "--config", str(tmp_path / "config.toml"))
    assert "the policy is right, 1 rule:" in daemon.nsfs(*check).stderr
    policy.write_text("[[rule]]\nscope = 'none'\n")
    refused = daemon.nsfs(*check, check=False)
    assert refused.returncode == 2
    assert "rule[0].scope: invalid enum value 'none'" in refused.stderr
