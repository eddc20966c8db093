"""Digests become paths, so nothing but the grammar may pass."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsfs.errors import UsageError
from nsfs.model.digest import DiffId, Digest, chain_ids

GOOD = "sha256:" + "ab" * 32


def test_a_good_one() -> None:
    digest = Digest(GOOD)
    assert digest == GOOD
    assert (digest.algorithm, digest.hex) == ("sha256", "ab" * 32)
    assert Digest("sha512:" + "0" * 128).algorithm == "sha512"
    assert Digest.of(b"") == "sha256:" + hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256:",
        GOOD[:-1],
        GOOD + "0",
        GOOD.upper(),
        GOOD + "\n",
        " " + GOOD,
        "sha256:../../../../etc/passwd",
        "sha256:" + "0" * 62 + "/x",
        "sha512:" + "0" * 64,
        "md5:" + "0" * 32,
        "SHA256:" + "0" * 64,
        "sha256:" + "\N{ARABIC-INDIC DIGIT ONE}" * 64,
        "ab" * 32,
    ],
)
def test_bad_ones(text: str) -> None:
    with pytest.raises(UsageError):
        Digest(text)


@given(st.text())
def test_no_text_makes_a_path_that_leads_elsewhere(text: str) -> None:
    try:
        digest = Digest(text)
    except UsageError:
        return
    assert set(digest.hex) <= set("0123456789abcdef")


def test_chain_ids_are_those_of_the_image_specification() -> None:
    first, second = DiffId(Digest.of(b"1")), DiffId(Digest.of(b"2"))
    chains = chain_ids([first, second])
    assert chains == [first, Digest.of(f"{first} {second}".encode())]
    assert chain_ids([]) == []
