"""Challenges, token requests and answers: pure parts of authentication."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsfs.errors import DeniedError, UnreachableError
from nsfs.remote.auth import Challenge, parse_challenges, parse_token, plan_token_request
from nsfs.remote.credentials import Credential

REALM = "https://auth.example/token"
ANN = Credential("ann", "hunter2")


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (
            [
                'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push"'
            ],
            [
                (
                    "bearer",
                    {
                        "realm": "https://auth.docker.io/token",
                        "service": "registry.docker.io",
                        "scope": "repository:a/b:pull,push",
                    },
                )
            ],
        ),
        (['Basic realm="x"'], [("basic", {"realm": "x"})]),
        (["Basic"], [("basic", {})]),
        (['BEARER Realm = "a" , Service=b'], [("bearer", {"realm": "a", "service": "b"})]),
        (['Basic realm="x", Bearer realm="y"'], [("basic", {"realm": "x"}), ("bearer", {"realm": "y"})]),
        (["Negotiate, Basic realm=x"], [("negotiate", {}), ("basic", {"realm": "x"})]),
        (['Basic realm="a\\"b,c=d"'], [("basic", {"realm": 'a"b,c=d'})]),
        (["Basic realm=x", "Bearer realm=y"], [("basic", {"realm": "x"}), ("bearer", {"realm": "y"})]),
        (['Bearer realm="x",realm="y"'], [("bearer", {"realm": "x"})]),
        ([], []),
        ([""], []),
        ([",,,"], []),
    ],
)
def test_challenges(headers: list[str], expected: list[tuple[str, dict[str, str]]]) -> None:
    assert [(found.scheme, dict(found.parameters)) for found in parse_challenges(headers)] == expected


@given(st.lists(st.text(st.sampled_from('Bearer =",\\\t') | st.characters(), max_size=200)))
def test_no_header_is_an_error(headers: list[str]) -> None:
    parse_challenges(headers)


def challenge(**parameters: str) -> Challenge:
    return Challenge("bearer", {"realm": REALM, **parameters})


class TestTokenRequest:
    def test_anonymous(self) -> None:
        request = plan_token_request(challenge(service="s"), "a/b", None, plain=False)
        assert request.query == (("service", "s"), ("scope", "repository:a/b:pull"))
        assert request.authorization is None

    def test_with_a_password(self) -> None:
        request = plan_token_request(challenge(), "a/b", ANN, plain=False)
        assert request.authorization == ANN.basic
        assert ("account", "ann") in request.query

    def test_with_an_identity_token(self) -> None:
        request = plan_token_request(challenge(service="s"), "a/b", Credential("", identity_token="t"), plain=False)
        assert request.form is not None
        assert dict(request.form)["refresh_token"] == "t"
        assert request.authorization is None

    @pytest.mark.parametrize(
        ("scope", "asked"),
        [
            ("repository:proxy/a/b:pull", "repository:proxy/a/b:pull"),
            ("repository:a/b:pull,push", "repository:a/b:pull"),
            ("registry:catalog:*", "repository:a/b:pull"),
            ("repository:a/b:pull repository:c:*", "repository:a/b:pull"),
        ],
    )
    def test_never_more_than_pulling(self, scope: str, asked: str) -> None:
        request = plan_token_request(challenge(scope=scope), "a/b", None, plain=False)
        assert dict(request.query)["scope"] == asked

    def test_a_token_server_without_tls_is_refused_unless_the_registry_has_none(self) -> None:
        plain = Challenge("bearer", {"realm": "http://auth.example/"})
        with pytest.raises(DeniedError, match="without TLS"):
            plan_token_request(plain, "a", ANN, plain=False)
        assert plan_token_request(plain, "a", ANN, plain=True).url == "http://auth.example/"

    @pytest.mark.parametrize("realm", ["", "x", "file:///etc", "https://", "https://[", "https://u:p@x/"])
    def test_realms_that_are_no_urls(self, realm: str) -> None:
        with pytest.raises(UnreachableError):
            plan_token_request(Challenge("bearer", {"realm": realm}), "a", ANN, plain=True)

    def test_secrets_are_in_no_repr(self) -> None:
        for credential in (ANN, Credential("", identity_token="hunter2")):
            request = plan_token_request(challenge(), "a", credential, plain=False)
            for value in (credential, request, parse_token(b'{"token":"hunter2"}')):
                assert "hunter2" not in repr(value)
                assert ANN.basic not in repr(value)


class TestToken:
    @pytest.mark.parametrize(
        ("answer", "value", "life"),
        [
            (b'{"token":"t"}', "t", 48),
            (b'{"access_token":"t","expires_in":300}', "t", 240),
            (b'{"token":"","access_token":"a"}', "a", 48),
            (b'{"token":"t","expires_in":1e30}', "t", 2880),
            (b'{"token":"t","expires_in":-5}', "t", 48),
            (b'{"token":"t","expires_in":"300"}', "t", 48),
            (b'{"token":"t","expires_in":true}', "t", 48),
        ],
    )
    def test_answers(self, answer: bytes, value: str, life: float) -> None:
        token = parse_token(answer)
        assert token.value == value
        assert token.life == pytest.approx(life)

    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"[]",
            b"null",
            b"{}",
            b'{"token":7}',
            b'{"token":"a\\r\\nX: y"}',
            b'{"token":"a b"}',
            b"<html>",
            b"[" * 9999,
        ],
    )
    def test_answers_without_a_token(self, answer: bytes) -> None:
        with pytest.raises(DeniedError, match="no token"):
            parse_token(answer)
