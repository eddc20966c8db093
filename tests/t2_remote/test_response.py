"""What answers mean."""

from __future__ import annotations

import email.utils

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsfs.errors import CorruptError, DeniedError, NotFoundError, NsfsError, UnreachableError, UnsupportedError
from nsfs.remote.response import (
    Wanted,
    origin,
    parse_reason,
    parse_retry_after,
    plan_redirect,
    plan_skip,
    refusal,
)

NOW = 1_800_000_000.0
PART = Wanted(10, 5, 100)
WHOLE = Wanted(0, 100, 100)


class TestRanges:
    @pytest.mark.parametrize(
        ("status", "headers", "wanted", "skip"),
        [
            (206, {"content-range": "bytes 10-14/100", "content-length": "5"}, PART, 0),
            (206, {"content-range": "bytes 10-14/*"}, PART, 0),
            (206, {"content-range": "bytes 0-99/100"}, WHOLE, 0),
            (200, {"content-length": "100"}, PART, 10),
            (200, {}, PART, 10),
            (200, {"content-length": "100"}, WHOLE, 0),
        ],
    )
    def test_accepted(self, status: int, headers: dict[str, str], wanted: Wanted, skip: int) -> None:
        assert plan_skip(status, headers, wanted) == skip

    @pytest.mark.parametrize(
        ("status", "headers"),
        [
            (206, {}),
            (206, {"content-range": "bytes 9-13/100"}),
            (206, {"content-range": "bytes 10-15/100"}),
            (206, {"content-range": "bytes 10-14/101"}),
            (206, {"content-range": "bytes 10-14/100", "content-length": "6"}),
            (206, {"content-range": "bytes */100"}),
            (206, {"content-range": "bytes 10-14/100, bytes 20-24/100"}),
            (206, {"content-type": "multipart/byteranges; boundary=x", "content-length": "5"}),
            (200, {"content-length": "5"}),
            (200, {"content-length": "5", "content-range": "bytes 10-14/100"}),
            (200, {"content-length": "-5"}),
            (200, {"content-length": "1" * 30}),
            (204, {}),
            (203, {"content-length": "100"}),
        ],
    )
    def test_refused(self, status: int, headers: dict[str, str]) -> None:
        with pytest.raises(CorruptError):
            plan_skip(status, headers, PART)

    @given(st.text(max_size=40), st.sampled_from([200, 206]))
    def test_no_header_is_a_crash(self, text: str, status: int) -> None:
        try:
            skip = plan_skip(status, {"content-range": text, "content-length": text}, PART)
        except CorruptError:
            return
        assert skip in {0, 10}


class TestRetryAfter:
    @pytest.mark.parametrize(
        ("text", "seconds"),
        [
            (None, None),
            ("0", 0),
            (" 17 ", 17),
            ("999999999999", 86_400),
            ("-1", None),
            ("soon", None),
            ("", None),
            ("1.5", None),
            (email.utils.formatdate(NOW + 30, usegmt=True), 30),
            (email.utils.formatdate(NOW - 30, usegmt=True), 0),
            (email.utils.formatdate(NOW + 1e7, usegmt=True), 86_400),
            ("Fri, 99 Foo 2099 00:00:00 GMT", None),
        ],
    )
    def test_both_forms(self, text: str | None, seconds: float | None) -> None:
        assert parse_retry_after(text, NOW) == (None if seconds is None else pytest.approx(seconds, abs=1))

    @given(st.text(max_size=40))
    def test_no_text_is_a_crash(self, text: str) -> None:
        wait = parse_retry_after(text, NOW)
        assert wait is None or 0 <= wait <= 86_400


class TestRedirects:
    @pytest.mark.parametrize(
        ("url", "location", "plain", "target"),
        [
            ("https://a/v2/x", "https://b/y?z", False, "https://b/y?z"),
            ("https://a/v2/x", "/y", False, "https://a/y"),
            ("https://a/v2/x", "//b/y", False, "https://b/y"),
            ("http://a/v2/x", "http://b/y", True, "http://b/y"),
            ("http://a/v2/x", "https://b/y", True, "https://b/y"),
        ],
    )
    def test_targets(self, url: str, location: str, plain: bool, target: str) -> None:
        assert plan_redirect(url, location, plain=plain) == target

    def test_no_downgrade(self) -> None:
        with pytest.raises(DeniedError, match="plain HTTP"):
            plan_redirect("https://a/", "http://a/", plain=False)

    @pytest.mark.parametrize(
        "location", ["", "file:///etc/passwd", "http://", "http://[", "javascript:x", "//x:70000/"]
    )
    def test_no_urls(self, location: str) -> None:
        with pytest.raises(CorruptError):
            plan_redirect("https://a/", location, plain=True)

    def test_origins(self) -> None:
        assert origin("https://A/x") == origin("https://a:443/y")
        assert origin("http://a") != origin("https://a")
        assert origin("https://a:444") != origin("https://a")


class TestRefusals:
    @pytest.mark.parametrize(
        ("status", "error"),
        [
            (400, UnsupportedError),
            (401, DeniedError),
            (403, DeniedError),
            (404, NotFoundError),
            (405, UnsupportedError),
            (408, UnreachableError),
            (410, NotFoundError),
            (416, CorruptError),
            (429, UnreachableError),
            (451, DeniedError),
            (500, UnreachableError),
            (503, UnreachableError),
            (599, UnreachableError),
        ],
    )
    def test_by_status(self, status: int, error: type[NsfsError]) -> None:
        found = refusal(status, {"retry-after": "3"}, "host: thing", b"", NOW)
        assert type(found) is error
        assert "host: thing" in found.message
        assert found.message == found.message.strip()
        if isinstance(found, UnreachableError):
            assert found.retry_after == 3

    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            (b'{"errors":[{"code":"DENIED","message":"no"}]}', "DENIED no"),
            (b'{"errors":[{"code":"DENIED"}]}', "DENIED"),
            (b'{"errors":[{"message":"a\\u001b[2Jb"}]}', "a [2Jb"),
            (b'{"errors":[{"message":"' + b"x" * 999 + b'"}]}', "x" * 200),
            (b'{"errors":[]}', ""),
            (b'{"errors":[3]}', ""),
            (b'{"errors":3}', ""),
            (b'{"errors":{"a":1}}', ""),
            (b"[]", ""),
            (b"<html>", ""),
            (b"", ""),
        ],
    )
    def test_reasons(self, body: bytes, reason: str) -> None:
        assert parse_reason(body) == reason
