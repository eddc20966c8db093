from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsfs.errors import DeniedError, NotFoundError, UsageError
from nsfs.model.policy import Isolation
from nsfs.serve.config import (
    Config,
    Duration,
    Endpoint,
    Namespace,
    Size,
    known_keys,
    load_config,
    load_private_config,
    pack_config,
    parse_config,
    parse_endpoint,
    private_log,
    unpack_config,
)

_EXAMPLE = Path(__file__).parents[2] / "contrib/config.toml"


def _leaves(table: dict[str, object], prefix: str = "") -> set[str]:
    return {
        leaf
        for key, value in table.items()
        for leaf in (_leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key})
    }


def test_the_example_lists_every_key_with_its_default() -> None:
    text = _EXAMPLE.read_text()
    assert _leaves(tomllib.loads(text)) == set(known_keys())
    assert parse_config(text) == parse_config("")


def test_the_example_says_something_about_every_key() -> None:
    lines = _EXAMPLE.read_text().splitlines()
    for number, line in enumerate(lines):
        if " = " in line and not line.startswith("#"):
            assert lines[number - 1].startswith("#"), line


def test_every_key_can_be_changed() -> None:
    text = """
    root = "/a"
    run = "/b"
    socket = "/c"
    log_level = "debug"
    log_format = "json"
    isolation = "pod"
    trust_index = "same-repository"
    policy = "/f"
    encrypt = "all"
    key_file = "/k"
    on_error = "eio"
    prepare = "strict"
    prepare_wait = "3s"
    uid_range = "7-9"
    grant_ttl = "5m"
    [registry]
    config_path = "/d"
    docker_config = "/e"
    docker_config_for = "all"
    connect_timeout = "500ms"
    read_timeout = 7
    connections = 1
    [fetch]
    concurrency = 2
    read_ahead = "64 KiB"
    complete = true
    complete_rate = "1MiB"
    [pool]
    max_bytes = "1GiB"
    reserve = 0
    high = 0.5
    low = 0.25
    [containerd]
    address = "/g"
    profile = "off"
    [metrics]
    listen = "unix:/m"
    [kernel]
    erofs = false
    file_backed = false
    directio = false
    resend = false
    idmap = false
    """
    config, default = parse_config(text), parse_config("")
    assert _leaves(tomllib.loads(text)) == set(known_keys())
    for key in known_keys():
        table, _, name = key.rpartition(".")
        of, was = (getattr(config, table), getattr(default, table)) if table else (config, default)
        assert getattr(of, name) != getattr(was, name), key
    assert config.isolation is Isolation.POD
    assert config.registry.connect_timeout == 0.5
    assert config.registry.read_timeout == 7.0
    assert config.fetch.read_ahead == 65536


def test_the_socket_lies_in_the_run_directory() -> None:
    assert parse_config('run = "/x"').socket == "/x/nsfs.sock"


def test_where_metrics_are_served() -> None:
    assert parse_endpoint("127.0.0.1:9464") == Endpoint("", "127.0.0.1", 9464)
    assert parse_endpoint("[::1]:9464") == Endpoint("", "::1", 9464)
    assert parse_endpoint("unix:/m:1") == Endpoint("/m:1")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("log-level = 'info'", "unknown key: log-level", "log_level"),
        ("[kernell]\nresend = true", "unknown key: kernell.resend", "kernel.resend"),
        ("[fetch]\nread_ahed = 1", "unknown key: fetch.read_ahed", "fetch.read_ahead"),
        ("[fetch.deep]\nread_ahead = 1", "unknown key: fetch.deep", "fetch."),
        ("registry = 1", "a table, not a value: registry", "[registry]"),
        ("root = 1", "root: expected `str`, got `int`", None),
        ("root = 'relative'", "root: not an absolute path: 'relative'", None),
        ("isolation = 'none'", "isolation: invalid enum value 'none'", None),
        ("log_level = 'loud'", "log_level: invalid enum value 'loud'", None),
        ("on_error = 'never'", "on_error: not an on-error choice: 'never'", "wait"),
        ("[registry]\nconnections = 0", "registry.connections: expected `int` >= 1", None),
        ("[registry]\nread_timeout = 'soon'", "registry.read_timeout: not a duration", None),
        ("[fetch]\nread_ahead = '1 MB'", "fetch.read_ahead: not a size", None),
        ("[fetch]\nread_ahead = true", "fetch.read_ahead: not a size", None),
        ("[fetch]\nread_ahead = -1", "fetch.read_ahead: not a size", None),
        ("[namespace.a]\ndocker_confg = '/x'", "unknown key: namespace.a.docker_confg", "namespace.a.docker_config"),
        ("[namespace.a]\ndocker_config = 'x'", "namespace.a.docker_config: not an absolute path", None),
        ("[namespace.a]\nmemory = '1MiB'", "namespace.a.memory: less than a worker needs", "256 MiB"),
        ("[namespace.a]\nnetns = 'a'", "namespace.a.netns: not an absolute path", None),
        ("uid_range = '9-7'", "uid_range: not a range of uids: '9-7'", "FIRST-LAST"),
        ("uid_range = '0-7'", "uid_range: not a range of uids", "FIRST-LAST"),
        ("[namespace.a.b]\nx = 1", "unknown key: namespace.a.b", None),
        ("[namespace]\na = 1", "a table, not a value: namespace.a", "[namespace.a]"),
        ("namespace = 1", "a table, not a value: namespace", "[namespace.<name>]"),
        ("[namespace.'../x']\ndocker_config = '/x'", "not a namespace", "letters"),
        ("root =", "is no TOML", None),
        (f"socket = '/{'x' * 107}'", "socket: longer than the 107 bytes", None),
        (f"[metrics]\nlisten = 'unix:/{'x' * 107}'", "metrics.listen: longer than the 107 bytes", None),
        ("[metrics]\nlisten = 'unix:m.sock'", "metrics.listen: not an address to listen at: 'unix:m.sock'", "unix:/"),
        ("[metrics]\nlisten = ':9464'", "metrics.listen: not an address", "127.0.0.1:9464"),
        ("[metrics]\nlisten = 'localhost:9464'", "metrics.listen: not an address", "127.0.0.1:9464"),
        ("[metrics]\nlisten = '::1:9464'", "metrics.listen: not an address", "[::1]:9464"),
        ("[metrics]\nlisten = '127.0.0.1:65536'", "metrics.listen: not an address", "127.0.0.1:9464"),
        ("[metrics]\nlisten = 9464", "metrics.listen: expected `str`", None),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        parse_config(text, source="here.toml")
    assert caught.value.message.startswith("here.toml")
    assert message in caught.value.message
    assert (hint or "") in (caught.value.hint or "")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"gone\.toml"):
        load_config(str(tmp_path / "gone.toml"))
    with pytest.raises(UsageError, match=str(tmp_path)):
        load_config(str(tmp_path))
    (tmp_path / "latin.toml").write_bytes(b"root = '/\xff'")
    with pytest.raises(UsageError, match=r"latin\.toml"):
        load_config(str(tmp_path / "latin.toml"))


def test_denied_is_not_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DeniedError):
        load_config(str(tmp_path / "x"))


@given(st.integers(0, 10**12), st.sampled_from(["", "B", "KiB", "MiB", "GiB", "TiB"]), st.sampled_from(["", " "]))
def test_sizes(number: int, unit: str, space: str) -> None:
    power = ["", "KiB", "MiB", "GiB", "TiB"].index(unit if unit != "B" else "")
    assert Size.parse(f"{number}{space if unit else ''}{unit}") == number * 1024**power


@given(st.integers(0, 10**6))
def test_durations(number: int) -> None:
    assert Duration.parse(f"{number}ms") == pytest.approx(number / 1000)
    assert Duration.parse(f"{number}m") == Duration.parse(number * 60)
    assert Duration.parse(number / 8) == number / 8


@given(st.text(max_size=20) | st.none() | st.lists(st.integers()) | st.floats(allow_nan=True))
def test_nonsense_is_no_size(value: object) -> None:
    try:
        size = Size.parse(value)
    except ValueError:
        return
    assert str(value)[0].isdecimal()
    assert size >= 0


def test_private_places_follow_xdg() -> None:
    config = load_private_config({"HOME": "/home/ann"}, 1000)
    assert (config.root, config.run) == ("/home/ann/.local/share/nsfs", "/tmp/nsfs-1000")
    assert config.socket == "/tmp/nsfs-1000/nsfs.sock"
    assert private_log({"HOME": "/home/ann"}) == "/home/ann/.local/state/nsfs/daemon.log"
    environ = {"XDG_DATA_HOME": "/d", "XDG_STATE_HOME": "/s", "XDG_RUNTIME_DIR": "/r", "XDG_CONFIG_HOME": "/c"}
    config = load_private_config(environ, 1000)
    assert (config.root, config.run, private_log(environ)) == ("/d/nsfs", "/r/nsfs", "/s/nsfs/daemon.log")


def test_relative_xdg_places_are_ignored() -> None:
    environ = {"HOME": "/h", "XDG_DATA_HOME": "d", "XDG_RUNTIME_DIR": "r"}
    config = load_private_config(environ, 5)
    assert (config.root, config.run) == ("/h/.local/share/nsfs", "/tmp/nsfs-5")


def test_no_home_is_an_error_not_a_directory_called_none() -> None:
    with pytest.raises(UsageError, match="HOME"):
        load_private_config({}, 1)


def test_a_user_has_a_configuration_of_his_own(tmp_path: Path) -> None:
    (tmp_path / "nsfs").mkdir()
    (tmp_path / "nsfs/config.toml").write_text("[fetch]\nconcurrency = 3\n")
    config = load_private_config({"HOME": "/h", "XDG_CONFIG_HOME": str(tmp_path)}, 5)
    assert config.fetch.concurrency == 3
    assert config.root == "/h/.local/share/nsfs"


def test_a_namespace_has_a_table_of_its_own() -> None:
    config = parse_config("[namespace.'team.a']\ndocker_config = '/a'\ncredential_provider = ['/bin/p', 'x']")
    assert config.of_namespace("team.a") == Namespace(docker_config="/a", credential_provider=("/bin/p", "x"))
    assert config.of_namespace("team-b") == Namespace()


def test_a_worker_knows_what_its_own_namespace_may_and_nothing_of_others() -> None:
    config = parse_config("[registry]\nconnections = 9\n[namespace.a]\nconnections = 2\ndocker_config = '/a'")
    assert [config.for_worker(owner).registry.connections for owner in ("a", "b", "")] == [2, 9, 9]
    assert config.for_worker("a").namespace == {}
    assert unpack_config(pack_config(config)) == config


def test_a_configuration_crosses_processes() -> None:
    config = parse_config("[fetch]\nread_ahead = '3MiB'\n[registry]\nread_timeout = '2m'")
    assert unpack_config(pack_config(config)) == config


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(AttributeError):
        parse_config("").root = "/other"  # type: ignore[misc]
    assert msgspec.structs.replace(Config(), root="/x").root == "/x"
