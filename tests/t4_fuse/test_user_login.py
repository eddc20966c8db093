"""Credentials per namespace, as a user keeps them: each namespace asks registries as itself, and as nobody else."""

from __future__ import annotations

import base64
import json
import os
import re
import resource
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from images import Image, file, gzip_layer
from nsfs_daemon import NSFS, Daemon, run_daemon
from private_user import UID, private_user
from registry import PASSWORD, USER, Registry, run_registry
from users import cat, noise, push, read, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DATA = noise(60_000, 601)
IMAGE = Image((gzip_layer([file("data", DATA)]),))
ENCODED = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with run_registry(auth=True) as registry:
        push(IMAGE, registry, tmp_path_factory.mktemp("image"), "locked")
        yield registry


def login(daemon: Daemon, namespace: str, registry: str, password: str) -> subprocess.CompletedProcess[str]:
    command = [*NSFS, "--socket", daemon.socket, "login", "-n", namespace, "-u", USER, "--password-stdin", registry]
    return subprocess.run(command, check=False, input=password + "\n", capture_output=True, text=True)


def looks(daemon: Daemon, locked: Registry, namespace: str) -> int:
    """The exit code of `nsfs cat`, which gives the right bytes where that is 0."""
    reference = f"{locked.host}/locked:/data"
    done = daemon.nsfs("stat", reference, "--namespace", namespace, check=False)
    if done.returncode == 0:
        assert cat(daemon, reference, "--namespace", namespace) == DATA
    return done.returncode


def docker_config(path: Path, host: str) -> str:
    path.write_text(json.dumps({"auths": {host: {"auth": ENCODED}}}))
    return str(path)


def test_a_namespace_logs_in_and_out(locked: Registry, arena: Path) -> None:
    with run_daemon(str(arena / "d"), {"log_level": "debug"}) as daemon:
        wrong = login(daemon, "team-a", locked.host, "wrong")
        assert wrong.returncode == 4, wrong.stderr
        assert not os.path.exists(f"{daemon.root}/credentials")
        assert looks(daemon, locked, "team-a") == 4
        done = login(daemon, "team-a", locked.host, PASSWORD)
        assert done.returncode == 0, done.stderr
        kept = f"{daemon.root}/credentials/team-a/config.json"
        assert os.stat(kept).st_mode & 0o777 == 0o600
        assert looks(daemon, locked, "team-a") == 0
        for other in ("team-b", "default", "team-a.x"):
            assert looks(daemon, locked, other) == 4
        daemon.nsfs("logout", "-n", "team-a", locked.host)
        daemon.nsfs("evict", f"{locked.host}/locked", "--namespace", "team-a", check=False)
        again = daemon.nsfs("logout", "-n", "team-a", locked.host, check=False)
        assert again.returncode == 3
        log = read(daemon.log).decode()
        assert not [secret for secret in (PASSWORD, ENCODED) if secret in log + done.stderr + wrong.stderr]


def test_the_host_s_credentials_are_the_default_namespace_s(locked: Registry, arena: Path) -> None:
    config = docker_config(arena / "config.json", locked.host)
    with run_daemon(str(arena / "d"), {"registry": {"docker_config": config}}) as daemon:
        assert looks(daemon, locked, "default") == 0
        assert looks(daemon, locked, "team-a") == 4
    with run_daemon(str(arena / "e"), {"registry": {"docker_config": config, "docker_config_for": "all"}}) as daemon:
        assert looks(daemon, locked, "team-a") == 0


def test_files_helpers_and_providers_of_namespaces(locked: Registry, arena: Path) -> None:
    helper = arena / "docker-credential-vault"
    helper.write_text(f'#!/bin/sh\nprintf \'{{"Username":"{USER}","Secret":"{PASSWORD}"}}\'\n')
    (arena / "b.json").write_text(json.dumps({"credHelpers": {locked.host: "vault"}}))
    provider = arena / "provider"
    answer = {
        "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
        "kind": "CredentialProviderResponse",
        "cacheKeyType": "Registry",
        "cacheDuration": "1h",
        "auth": {locked.host: {"username": USER, "password": PASSWORD}},
    }
    provider.write_text(f"#!/bin/sh\ntest $NSFS_NAMESPACE = team-c && printf '{json.dumps(answer)}'\n")
    for program in (helper, provider):
        program.chmod(0o755)
    namespaces = {
        "namespace.team-a": {"docker_config": docker_config(arena / "a.json", locked.host)},
        "namespace.team-b": {"docker_config": str(arena / "b.json")},
        "namespace.team-c": {"credential_provider": [str(provider)]},
        "namespace.team-d": {"credential_provider": [str(provider)]},
    }
    os.environ["PATH"] += f":{arena}"
    try:
        with run_daemon(str(arena / "d"), {"log_level": "debug", **namespaces}) as daemon:
            seen = {name: looks(daemon, locked, name) for name in ("team-a", "team-b", "team-c", "team-d", "team-e")}
            assert seen == {"team-a": 0, "team-b": 0, "team-c": 0, "team-d": 4, "team-e": 4}
            status = daemon.nsfs("status", "--json").stdout
            log = read(daemon.log).decode()
            assert not [secret for secret in (PASSWORD, ENCODED) if secret in log + status]
            assert not os.path.exists(f"{daemon.root}/credentials")
            for pid in (daemon.pid, *daemon.workers().values()):
                assert not dumps_core(pid)
    finally:
        os.environ["PATH"] = os.environ["PATH"].removesuffix(f":{arena}")


def test_who_has_a_secret_dumps_no_core(locked: Registry, arena: Path) -> None:
    """The daemon, `nsfs login`, and the programs that are asked for credentials, by their limits; none is dumpable."""
    seen = arena / "seen"
    helper = arena / "docker-credential-dumps"
    helper.write_text(f"#!/bin/sh\ncat /proc/self/limits >>{seen}\necho 'credentials not found'\nexit 1\n")
    helper.chmod(0o755)
    (arena / "a.json").write_text(json.dumps({"credsStore": "dumps"}))
    command = [*NSFS, "--socket", "SOCKET", "login", "-n", "other", locked.host, "--username", USER, "--password-stdin"]
    pipe = subprocess.PIPE
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(arena), prepend=":")
        resource.prlimit(0, resource.RLIMIT_CORE, (1 << 20, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        with run_daemon(str(arena / "d"), {"namespace.team": {"docker_config": str(arena / "a.json")}}) as daemon:
            assert looks(daemon, locked, "team") != 0
            command[command.index("SOCKET")] = daemon.socket
            with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as login:
                wait_until(lambda: core_limit(read(f"/proc/{login.pid}/limits")) == [b"1", b"1"], "login's limit")
                assert not dumps_core(login.pid)
                login.communicate(b"wrong\n")
            for found in (read(str(seen)), *(read(f"/proc/{pid}/limits") for pid in below(daemon.pid))):
                assert core_limit(found) in ([b"1", b"1"], [b"0", b"0"])


def below(pid: int) -> list[int]:
    """A process, and those that it started."""
    children = read(f"/proc/{pid}/task/{pid}/children").split()
    return [pid, *(each for child in children for each in below(int(child)))]


def core_limit(limits: bytes) -> list[bytes]:
    """Soft and hard limit (proc(5))."""
    found = re.search(rb"^Max core file size +(\S+) +(\S+)", limits, re.MULTILINE)
    assert found is not None
    return list(found.groups())


def dumps_core(pid: int) -> bool:
    """Whether a process is dumpable: only then may others of its user, without capabilities, see it (prctl(2))."""
    script = f"exec 3</proc/{pid}/environ"
    status = re.search(r"^Uid:\s+(\d+)", read(f"/proc/{pid}/status").decode(), re.MULTILINE)
    assert status is not None
    command = ["setpriv", f"--reuid={status[1]}", "--bounding-set=-all", "--inh-caps=-all", "sh", "-c", script]
    return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0


def test_a_private_daemon_keeps_to_its_user_s_docker_configuration(locked: Registry, arena: Path) -> None:
    with private_user() as user:
        directory = user.directory(".docker")
        config = docker_config(arena / "user.json", locked.host)
        shutil.copy(config, f"{directory}/config.json")
        os.chown(f"{directory}/config.json", UID, UID)
        assert user.json("stat", f"{locked.host}/locked:/data")[0]["size"] == len(DATA)
        refused = user.nsfs("logout", locked.host, check=False)
        assert refused.returncode == 9
        assert "docker login" in refused.stderr
