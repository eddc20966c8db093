"""Debian's packages, from wherever this machine gets its own, without touching this machine's apt.

Owns: finding the archive in the machine's apt sources, and private apt directories for another suite. Refuses to guess:
a machine whose sources name no Debian archive gets an error that says so. Nothing here needs more than one thread.
"""

from __future__ import annotations

import glob
import os
import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import prepared

if TYPE_CHECKING:
    from collections.abc import Iterator

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


@dataclass(frozen=True, slots=True)
class Archive:
    """Where packages come from."""

    uri: str
    suite: str
    keyring: str


def find_archive() -> Archive:
    """The Debian archive of this machine's release; raises LookupError if its apt sources name none."""
    suite = _release()
    for uri, suites, components in _sources():
        if suite in suites and "main" in components:
            return Archive(uri.rstrip("/"), suite, KEYRING)
    raise LookupError(f"no apt source of this machine has the main component of Debian's suite: {suite}")


def _release() -> str:
    with open("/etc/os-release") as file:
        match = re.search(r"^VERSION_CODENAME=\"?([a-z]+)", file.read(), re.MULTILINE)
    if match is None:
        raise LookupError("/etc/os-release has no VERSION_CODENAME: this is no Debian release")
    return match[1]


def _sources() -> Iterator[tuple[str, list[str], list[str]]]:
    """(uri, suites, components) of every binary source, in both of apt's formats (sources.list(5))."""
    for path in sorted(glob.glob("/etc/apt/sources.list.d/*.sources")):
        with open(path) as file:
            text = re.sub(r"^#.*\n", "", file.read(), flags=re.MULTILINE)
        for stanza in re.split(r"\n\s*\n", text):
            fields = {
                key.lower(): value.split() for key, value in re.findall(r"^([\w-]+):[ \t]*(.*)$", stanza, re.MULTILINE)
            }
            if "deb" in fields.get("types", []) and fields.get("enabled") != ["no"]:
                for uri in fields.get("uris", []):
                    yield uri, fields.get("suites", []), fields.get("components", [])
    for path in ["/etc/apt/sources.list", *sorted(glob.glob("/etc/apt/sources.list.d/*.list"))]:
        if not os.path.exists(path):
            continue
        with open(path) as file:
            for line in file:
                match = re.match(r"deb\s+(?:\[[^]]*\]\s*)?(\S+)\s+(\S+)\s+(.*)", line)
                if match is not None:
                    yield match[1], [match[2]], match[3].split()


def proxy_environment() -> dict[str, str]:
    """The process's environment, with apt's HTTP proxy for tools that only know the variable."""
    shown = subprocess.run(["apt-config", "dump", "Acquire::http::Proxy"], capture_output=True, text=True, check=True)
    match = re.search(r'^Acquire::http::Proxy "([^"]+)"', shown.stdout, re.MULTILINE)
    proxy = {"http_proxy": match[1]} if match is not None and match[1] != "DIRECT" else {}
    return {**proxy, **os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}


def fetch_package(package: str, suite: str, directory: str) -> str:
    """Unpack a package of `suite` into `directory`/root without installing it; returns that path.

    apt's state, lists and cache are below `directory` too, so that the host's are neither used nor changed.
    """
    root = f"{directory}/root"
    with prepared.alone(os.path.basename(directory)):
        if not os.path.exists(root):
            _fetch(package, suite, directory)
    return root


def _fetch(package: str, suite: str, directory: str) -> None:
    archive = find_archive()
    for name in ("etc/sources.list.d", "etc/preferences.d", "lists/partial", "cache/archives/partial", "state"):
        os.makedirs(f"{directory}/{name}", exist_ok=True)
    with open(f"{directory}/state/status", "w"):
        pass
    with open(f"{directory}/etc/sources.list.d/debian.sources", "w") as file:
        file.write(
            f"Types: deb\nURIs: {archive.uri}\nSuites: {suite}\nComponents: main\nSigned-By: {archive.keyring}\n"
        )
    with open(f"{directory}/apt.conf", "w") as file:
        file.write(_render_configuration(directory))
    apt = ["apt-get", "-q", "-c", f"{directory}/apt.conf"]
    subprocess.run([*apt, "update"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*apt, "download", package], check=True, cwd=directory, stdout=subprocess.DEVNULL)
    (path,) = glob.glob(f"{directory}/{package}_*.deb")
    subprocess.run(["dpkg-deb", "-x", path, f"{directory}/root.partial"], check=True)
    os.rename(f"{directory}/root.partial", f"{directory}/root")
    os.unlink(path)


def _render_configuration(directory: str) -> str:
    """Settings that keep apt inside `directory`; the host's own, such as its proxy, stay in force."""
    settings = {
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": f"{directory}/etc/sources.list.d",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": f"{directory}/etc/preferences.d",
        "Dir::State": f"{directory}/state",
        "Dir::State::status": f"{directory}/state/status",
        "Dir::State::lists": f"{directory}/lists",
        "Dir::Cache": f"{directory}/cache",
        "APT::Sandbox::User": "root",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
        "Acquire::Languages": "none",
    }
    hooks = ("APT::Update::Pre-Invoke", "APT::Update::Post-Invoke", "APT::Update::Post-Invoke-Success")
    return "".join(f"#clear {hook};\n" for hook in hooks) + "".join(f'{k} "{v}";\n' for k, v in settings.items())
