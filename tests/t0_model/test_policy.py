import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsfs.errors import DeniedError, UsageError
from nsfs.model.policy import (
    Isolation,
    Patience,
    parse_patience,
    parse_view_name,
    resolve_domain,
    resolve_private_domain,
    view_name,
)


@pytest.mark.parametrize(
    ("wish", "default", "name", "transient"),
    [
        ("shared", Isolation.ISOLATED, "shared", False),
        ("isolated", Isolation.SHARED, "ns/team-a", False),
        ("pod", Isolation.SHARED, "pod/m1", True),
        (None, Isolation.ISOLATED, "ns/team-a", False),
        (None, Isolation.SHARED, "shared", False),
    ],
)
def test_scope_decides_the_domain(wish: str | None, default: Isolation, name: str, transient: bool) -> None:
    domain = resolve_domain("team-a", wish, default, "m1")
    assert (domain.name, domain.transient) == (name, transient)


@pytest.mark.parametrize("namespace", ["", "a/b", "..", "a..b", "-a", "a" * 77, "a b", "ns\n", "ä", "a\x00"])
def test_odd_namespaces_are_refused(namespace: str) -> None:
    with pytest.raises(UsageError, match="not a namespace"):
        resolve_domain(namespace, None, Isolation.ISOLATED, "m1")


def test_unknown_isolation_is_refused_with_the_choices() -> None:
    with pytest.raises(UsageError) as caught:
        resolve_domain("a", "public", Isolation.ISOLATED, "m1")
    assert caught.value.hint == "one of shared, isolated, pod"


@pytest.mark.parametrize("wish", ["isolated", "pod"])
def test_users_who_are_not_root_have_one_domain(wish: str) -> None:
    assert resolve_private_domain(None) == resolve_private_domain("shared")
    with pytest.raises(DeniedError, match="isolation needs root"):
        resolve_private_domain(wish)


@pytest.mark.parametrize(("text", "seconds"), [("wait", None), ("wait:60s", 60), ("wait:5", 5), ("eio", 0)])
def test_patience(text: str, seconds: float | None) -> None:
    assert parse_patience(text) == Patience(seconds)


@pytest.mark.parametrize("text", ["", "wait:", "wait:-1s", "wait:1.5s", "EIO", "never"])
def test_other_patience_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not an on-error choice"):
        parse_patience(text)


@given(st.from_regex(r"[0-9a-f]{32}", fullmatch=True), st.none() | st.integers(0, 999_999))
def test_view_names_carry_map_and_patience(map_id: str, seconds: int | None) -> None:
    assert parse_view_name(view_name(map_id, Patience(seconds))) == (map_id, Patience(seconds))


@given(st.text(max_size=60))
def test_no_other_text_is_a_view_name(text: str) -> None:
    try:
        map_id, patience = parse_view_name(text)
    except UsageError:
        return
    assert parse_view_name(view_name(map_id, patience)) == (map_id, patience)
