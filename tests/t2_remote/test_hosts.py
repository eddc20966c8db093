"""hosts.toml: where a registry's content is looked for."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING

import pytest

from nsfs.errors import UsageError
from nsfs.remote.hosts import Tls, default_endpoint, is_loopback, load_endpoints, parse_hosts

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("registry", "base"),
    [
        ("docker.io", "https://registry-1.docker.io/v2"),
        ("ghcr.io", "https://ghcr.io/v2"),
        ("localhost", "http://localhost/v2"),
        ("localhost:5000", "http://localhost:5000/v2"),
        ("127.1.2.3:80", "http://127.1.2.3:80/v2"),
        ("[::1]:5000", "http://[::1]:5000/v2"),
        ("10.0.0.1:5000", "https://10.0.0.1:5000/v2"),
        ("localhost.example", "https://localhost.example/v2"),
    ],
)
def test_without_configuration(registry: str, base: str) -> None:
    assert default_endpoint(registry).base == base
    assert load_endpoints(registry, None) == (default_endpoint(registry),)


@pytest.mark.parametrize("registry", ["", "example.com", "128.0.0.1", "[::2]:1", "127.0.0.1.nip.example"])
def test_what_is_not_this_machine(registry: str) -> None:
    assert not is_loopback(registry)


FULL = """
server = "https://registry-1.docker.io"
capabilities = ["pull"]
ca = "server.pem"

[host."https://mirror.example:8443"]
  capabilities = ["pull", "resolve"]
  ca = ["a.pem", "/b.pem"]
  client = [["c.cert", "c.key"], ["d.pem", ""]]
  skip_verify = true
  [host."https://mirror.example:8443".header]
    x-one = "1"
    x-two = ["2", "3"]

[host."http://plain.example/some/path"]

[host."https://odd.example/api/registry"]
  override_path = true
  client = "e.pem"
"""


def test_everything_that_is_understood() -> None:
    mirror, plain, odd, server = parse_hosts(tomllib.loads(FULL), "docker.io", "/etc/x", str)
    assert mirror.base == "https://mirror.example:8443/v2"
    assert mirror.host == "mirror.example:8443"
    assert mirror.namespace == "docker.io"
    assert mirror.tls == Tls(
        ("/etc/x/a.pem", "/b.pem"), (("/etc/x/c.cert", "/etc/x/c.key"), ("/etc/x/d.pem", "")), True
    )
    assert mirror.headers == (("x-one", "1"), ("x-two", "2"), ("x-two", "3"))
    assert (plain.base, plain.plain) == ("http://plain.example/some/path/v2", True)
    assert plain.capabilities == {"pull", "resolve", "push"}
    assert odd.base == "https://odd.example/api/registry"
    assert odd.tls.client == (("/etc/x/e.pem", ""),)
    assert (server.base, server.namespace) == ("https://registry-1.docker.io/v2", "")
    assert server.capabilities == {"pull"}
    assert server.tls.ca == ("/etc/x/server.pem",)


def test_the_server_by_default() -> None:
    assert [endpoint.base for endpoint in parse_hosts({}, "docker.io", "/", str)] == ["https://registry-1.docker.io/v2"]
    assert parse_hosts({}, "localhost:5000", "/", str)[0].base == "http://localhost:5000/v2"
    assert parse_hosts({"server": "mirror.example"}, "a.example", "/", str)[0].namespace == "a.example"


@pytest.mark.parametrize(
    "text",
    [
        "server = 3",
        'server = "ftp://x"',
        'server = "https://"',
        'server = "https://user:secret@x"',
        'server = "https://x:0"',
        'server = "https://x?y"',
        "host = 3",
        '[host]\n"https://x" = 3',
        "ca = 3",
        "ca = [3]",
        'client = [["a", "b", "c"]]',
        'skip_verify = "yes"',
        "header = 3",
        "capabilities = {a = 1}",
    ],
)
def test_malformed(text: str) -> None:
    with pytest.raises(UsageError, match=r"hosts\.toml"):
        parse_hosts(tomllib.loads(text), "a.example", "/etc/x", str)


def test_directories_as_containerd_names_them(tmp_path: Path) -> None:
    def write(name: str, server: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "hosts.toml").write_text(f'server = "https://{server}"')

    def server(registry: str) -> str:
        return load_endpoints(registry, str(tmp_path))[-1].base

    assert server("a.example:5000") == "https://a.example:5000/v2"
    write("_default", "default.example")
    assert server("a.example:5000") == "https://default.example/v2"
    write("a.example:5000", "colon.example")
    assert server("a.example:5000") == "https://colon.example/v2"
    write("a.example_5000_", "underscore.example")
    assert server("a.example:5000") == "https://underscore.example/v2"


def test_a_file_that_is_no_toml(tmp_path: Path) -> None:
    (tmp_path / "a.example").mkdir()
    (tmp_path / "a.example" / "hosts.toml").write_text("[")
    with pytest.raises(UsageError, match="unreadable"):
        load_endpoints("a.example", str(tmp_path))
