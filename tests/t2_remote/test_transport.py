"""Proxies and TLS, with real certificates."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
import trio

import fakes
from nsfs.errors import DeniedError, NsfsError, UnreachableError, UsageError
from nsfs.model.oci import parse_manifest
from nsfs.remote.client import Patience
from nsfs.remote.reference import parse_reference
from nsfs.remote.source import open_source
from nsfs.remote.transport import Timeouts, plan_proxy

if TYPE_CHECKING:
    from pathlib import Path


class TestProxy:
    ENVIRONMENT = {  # noqa: RUF012
        "HTTPS_PROXY": "http://proxy.example:3128",
        "http_proxy": "plain-proxy.example:8080",
        "NO_PROXY": "direct.example, .dotted.example,*.star.example,10.0.0.0/8,[fd00::1]:5000,"
        "192.0.2.7,port.example:5000",
    }

    @pytest.mark.parametrize(
        ("url", "proxy"),
        [
            ("https://a.example/", "http://proxy.example:3128"),
            ("http://a.example/", "http://plain-proxy.example:8080"),
            ("https://direct.example/", None),
            ("https://sub.direct.example/", None),
            ("https://notdirect.example/", "http://proxy.example:3128"),
            ("https://sub.dotted.example/", None),
            ("https://sub.star.example:444/", None),
            ("https://10.1.2.3/", None),
            ("https://11.1.2.3/", "http://proxy.example:3128"),
            ("https://192.0.2.7:5000/", None),
            ("https://[fd00::1]:5000/", None),
            ("https://[fd00::1]/", "http://proxy.example:3128"),
            ("https://port.example:5000/", None),
            ("https://port.example/", "http://proxy.example:3128"),
            ("https://localhost/", None),
            ("http://127.9.9.9:5000/", None),
            ("http://[::1]:5000/", None),
        ],
    )
    def test_choice(self, url: str, proxy: str | None) -> None:
        assert plan_proxy(url, self.ENVIRONMENT) == proxy

    def test_none_and_all(self) -> None:
        assert plan_proxy("https://a/", {}) is None
        assert plan_proxy("https://a/", {"https_proxy": "http://p:1", "no_proxy": "*"}) is None

    @pytest.mark.parametrize("proxy", ["socks5://p:1", "ftp://p", "http://"])
    def test_proxies_that_cannot_be_used(self, proxy: str) -> None:
        with pytest.raises(UsageError, match="proxy") as caught:
            plan_proxy("https://a/", {"HTTPS_PROXY": proxy})
        assert "secret" not in str(caught.value)

    def test_a_proxy_is_used(self, tmp_path: Path) -> None:
        """The fake registry stands in for a proxy: what it logs is the request line that a proxy gets."""
        configure(tmp_path, "registry.invalid", 'server = "http://registry.invalid"')
        with fakes.FakeRegistry() as proxy:
            with pytest.raises(NsfsError) as caught:
                pull("registry.invalid", tmp_path, {"HTTP_PROXY": f"http://ann:secret@{proxy.host}"})
            (entry,) = proxy.log
        assert entry.path == "http://registry.invalid/v2/team/app/manifests/v1"
        assert entry.headers["proxy-authorization"].startswith("Basic ")
        assert "secret" not in str(caught.value)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ca.pem, and with server.pem and client.pem (certificate and key) that it signed."""
    directory = tmp_path_factory.mktemp("ca")
    sign(directory, "ca", "-x509", "-subj", "/CN=nsfs test authority")
    for name in ("server", "client"):
        extras = ("-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=CA:FALSE")
        sign(directory, name, "-x509", "-subj", f"/CN={name}", "-CA", "ca.pem", "-CAkey", "ca.pem", *extras)
    return directory


def sign(directory: Path, name: str, *options: str) -> None:
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-days", "2")
    files = ("-keyout", f"{name}.key", "-out", f"{name}.crt")
    command = ["openssl", "req", *key, *files, *options]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)
    text = (directory / f"{name}.crt").read_text() + (directory / f"{name}.key").read_text()
    (directory / f"{name}.pem").write_text(text)


def configure(directory: Path, registry: str, text: str) -> None:
    (directory / registry).mkdir()
    (directory / registry / "hosts.toml").write_text(text)


def pull(registry: str, hosts: Path, environment: dict[str, str] | None = None) -> bytes:
    """All of the image's first layer."""

    async def main() -> bytes:
        reference = parse_reference(f"{registry}/team/app:v1")
        settings = {"timeouts": Timeouts(2.0, 2.0), "patience": Patience(1), "environment": environment or {}}
        async with open_source(reference, hosts=str(hosts), **settings) as source:  # type: ignore[arg-type]
            manifest = parse_manifest(await source.manifest("v1"))
            return await source.blob(manifest.layers[0]).fetch(0, manifest.layers[0].size)

    return trio.run(main)


class TestTls:
    def serve(self, authority: Path, **options: str) -> fakes.FakeRegistry:
        registry = fakes.FakeRegistry(certificate=str(authority / "server.pem"), **options)  # type: ignore[arg-type]
        registry.add_image("team/app", "v1", b"layer")
        return registry

    def test_an_unknown_authority_is_refused(self, authority: Path, tmp_path: Path) -> None:
        with self.serve(authority) as registry:
            configure(tmp_path, registry.host, f'server = "https://{registry.host}"')
            with pytest.raises(UnreachableError, match="not trusted") as caught:
                pull(registry.host, tmp_path)
            assert registry.log == []
        assert caught.value.hint is not None

    @pytest.mark.parametrize("how", ["ca = '{ca}'", "skip_verify = true"])
    def test_a_known_authority_or_none(self, authority: Path, tmp_path: Path, how: str) -> None:
        with self.serve(authority) as registry:
            text = how.format(ca=authority / "ca.crt")
            configure(tmp_path, registry.host, f'server = "https://{registry.host}"\n{text}')
            assert pull(registry.host, tmp_path) == b"layer"

    def test_a_client_certificate(self, authority: Path, tmp_path: Path) -> None:
        with self.serve(authority, client_ca=str(authority / "ca.crt")) as registry:
            base = f'server = "https://{registry.host}"\nca = "{authority}/ca.crt"\n'
            configure(tmp_path, registry.host, base)
            with pytest.raises(UnreachableError):
                pull(registry.host, tmp_path)
            (tmp_path / registry.host / "hosts.toml").write_text(base + f'client = "{authority}/client.pem"')
            assert pull(registry.host, tmp_path) == b"layer"

    def test_a_redirect_to_plain_http_is_refused(self, authority: Path, tmp_path: Path) -> None:
        with self.serve(authority) as registry:
            registry.redirect = True
            configure(tmp_path, registry.host, f'server = "https://{registry.host}"\nskip_verify = true')
            with pytest.raises(DeniedError, match="plain HTTP"):
                pull(registry.host, tmp_path)
            assert registry.requests("storage") == []

    def test_a_missing_certificate_is_named(self, authority: Path, tmp_path: Path) -> None:
        with self.serve(authority) as registry:
            configure(tmp_path, registry.host, f'server = "https://{registry.host}"\nca = "nowhere.pem"')
            with pytest.raises(UsageError, match="certificate"):
                pull(registry.host, tmp_path)


class TestMirrors:
    def test_a_mirror_is_asked_first_and_told_for_whom(self, tmp_path: Path) -> None:
        with fakes.FakeRegistry() as mirror, fakes.FakeRegistry() as server:
            mirror.add_image("team/app", "v1", b"layer")
            text = f'server = "http://{server.host}"\n[host."http://{mirror.host}".header]\nx-team = "7"'
            configure(tmp_path, "registry.invalid", text)
            assert pull("registry.invalid", tmp_path) == b"layer"
            assert server.log == []
            assert all(entry.path.endswith("?ns=registry.invalid") for entry in mirror.log)
            assert all(entry.headers["x-team"] == "7" for entry in mirror.log)

    @pytest.mark.parametrize("trouble", ["EEEEEEEE", "missing", "FFFFFFFF", "WWWWWWWW", "XXXXXXXX"])
    def test_the_server_is_asked_where_a_mirror_fails(self, tmp_path: Path, trouble: str) -> None:
        with fakes.FakeRegistry() as mirror, fakes.FakeRegistry() as server:
            if trouble != "missing":
                mirror.add_image("team/app", "v1", b"layer")
                mirror.faults_on, mirror.script = "/v2/", trouble
            server.add_image("team/app", "v1", b"layer")
            text = f'server = "http://{server.host}"\n[host."http://{mirror.host}"]'
            configure(tmp_path, "registry.invalid", text)
            assert pull("registry.invalid", tmp_path) == b"layer"
            assert mirror.log

    def test_a_mirror_that_may_not_resolve_is_not_asked_for_tags(self, tmp_path: Path) -> None:
        with fakes.FakeRegistry() as mirror, fakes.FakeRegistry() as server:
            mirror.add_image("team/app", "v1", b"layer")
            server.add_image("team/app", "v1", b"layer")
            text = f'server = "http://{server.host}"\n[host."http://{mirror.host}"]\ncapabilities = ["pull"]'
            configure(tmp_path, "registry.invalid", text)
            assert pull("registry.invalid", tmp_path) == b"layer"
            assert ["manifests" in entry.path for entry in server.log] == [True]
            assert ["blobs" in entry.path for entry in mirror.log] == [True]
