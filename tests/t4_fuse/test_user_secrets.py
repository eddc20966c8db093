"""A registry that asks who is there: credentials are used, and written nowhere."""

from __future__ import annotations

import base64
import json
import re
from typing import TYPE_CHECKING

import pytest

from fakes import IDENTITY_TOKEN, PASSWORD, USER, FakeRegistry
from images import OCI_MANIFEST, Image, file, gzip_layer
from meter import Meter
from nsfs_daemon import run_daemon
from registry import run_registry
from users import cat, noise, push

if TYPE_CHECKING:
    from pathlib import Path

DATA = noise(400_000, 600)
IMAGE = Image((gzip_layer([file("data", DATA)]),))
SECRETS = (PASSWORD, IDENTITY_TOKEN, base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode())
LEAK = re.compile(r"authorization|bearer|token-\d|signature=", re.IGNORECASE)


def docker_config(path: Path, host: str) -> str:
    auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    path.write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return str(path)


def check_log(log: str) -> None:
    with open(log) as file:
        text = file.read()
    assert "DEBUG" in text or '"debug"' in text or "INFO" in text
    assert [secret for secret in SECRETS if secret in text] == []
    assert LEAK.findall(text) == []


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_registry_with_a_password(arena: Path, form: str) -> None:
    with run_registry(auth=True) as registry, Meter(registry.host) as meter:
        push(IMAGE, registry, arena, "locked")
        config = docker_config(arena / "config.json", meter.host)
        settings = {"log_level": "debug", "log_format": form, "registry": {"docker_config": config}}
        with run_daemon(str(arena / "d"), settings) as daemon:
            assert cat(daemon, f"{meter.host}/locked:/data") == DATA
            daemon.nsfs("evict", f"{meter.host}/locked")
            with daemon.mounted(f"{meter.host}/locked", str(arena / "mnt")):
                assert (arena / "mnt/data").read_bytes() == DATA
            (arena / "config.json").write_text("{}")
            said = daemon.nsfs("cat", f"{meter.host}/locked:/data", "--namespace", "other", check=False)
            assert said.returncode == 4, said.stderr
            assert [secret for secret in SECRETS if secret in said.stderr] == []
        check_log(daemon.log)


@pytest.mark.parametrize("script", ["", "A.EL", "TXSC"])
def test_tokens_redirects_and_faults(arena: Path, script: str) -> None:
    with FakeRegistry(auth="token", redirect=True) as registry:
        for blob in IMAGE.blobs():
            registry.add_blob(blob)
        registry.add_document("team/app", "1", IMAGE.manifest, OCI_MANIFEST)
        registry.script = script
        config = docker_config(arena / "config.json", registry.host)
        settings = {"log_level": "debug", "registry": {"docker_config": config, "read_timeout": "1s"}}
        with run_daemon(str(arena / "d"), settings) as daemon:
            assert cat(daemon, f"{registry.host}/team/app:1:/data") == DATA
        assert registry.script == ""
        assert any("authorization" in one.headers for one in registry.requests())
        assert not any("authorization" in one.headers for one in registry.requests("storage"))
        check_log(daemon.log)


def test_a_registry_that_says_no(arena: Path) -> None:
    with run_registry(auth=True) as locked, run_daemon(str(arena / "d"), {"log_level": "debug"}) as daemon:
        push(IMAGE, locked, arena, "locked")
        refused = daemon.nsfs("mount", f"{locked.host}/locked", str(arena), check=False)
        assert refused.returncode == 4, refused.stderr
        assert locked.host in refused.stderr
        assert "hint: " in refused.stderr
