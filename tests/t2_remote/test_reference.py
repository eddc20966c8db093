"""References: docker's habits, and layouts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsfs.errors import UsageError
from nsfs.remote.reference import LayoutReference, Reference, parse_reference

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("python", "docker.io/library/python:latest"),
        ("python:3.12", "docker.io/library/python:3.12"),
        ("docker.io/python", "docker.io/library/python:latest"),
        ("index.docker.io/python", "docker.io/library/python:latest"),
        ("docker.io/library/python", "docker.io/library/python:latest"),
        ("org/app", "docker.io/org/app:latest"),
        ("ghcr.io/org/app:1.2", "ghcr.io/org/app:1.2"),
        ("GHCR.io/org/app", "ghcr.io/org/app:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("127.0.0.1:5000/a/b/c:x", "127.0.0.1:5000/a/b/c:x"),
        ("[::1]:5000/app", "[::1]:5000/app:latest"),
        ("host:5000/app:tag", "host:5000/app:tag"),
        ("host/app", "docker.io/host/app:latest"),
        ("a.b/c", "a.b/c:latest"),
        (f"python@{DIGEST}", f"docker.io/library/python@{DIGEST}"),
        (f"python:3.12@{DIGEST}", f"docker.io/library/python:3.12@{DIGEST}"),
        (f"localhost:5000/x@{DIGEST}", f"localhost:5000/x@{DIGEST}"),
        ("a__b/c---d/e.f_g", "docker.io/a__b/c---d/e.f_g:latest"),
        ("python:_x.Y-1", "docker.io/library/python:_x.Y-1"),
        ("a:" + "t" * 128, "docker.io/library/a:" + "t" * 128),
    ],
)
def test_good_references(text: str, full: str) -> None:
    reference = parse_reference(text)
    assert isinstance(reference, Reference)
    assert str(reference) == full
    assert parse_reference(full) == reference


def test_parts() -> None:
    assert parse_reference(f"localhost:5000/a/b:t@{DIGEST}") == Reference("localhost:5000", "a/b", "t", DIGEST)  # type: ignore[arg-type]
    assert parse_reference(f"a:t@{DIGEST}").identifier == DIGEST
    assert parse_reference("a:t").identifier == "t"


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "@",
        "/",
        "a/",
        "/a",
        "a//b",
        "a:",
        "a@",
        "a:b:c",
        "a@sha256:abc",
        f"a@{DIGEST}@{DIGEST}",
        "a..b",
        "a._b",
        "a___b",
        "-a",
        "a-",
        "a/../b",
        "../a",
        "a b",
        "a\n",
        "a:b\n",
        "a:" + "t" * 129,
        "a:.x",
        "a" * 256,
        "host:99999/a",
        "-host.x/a",
        "host.x-/a",
        ":5000/a",
        "localhost:/a",
        "https://docker.io/a",
        "ab" * 32,
        "\N{CYRILLIC SMALL LETTER A}",
        "python:3.12\x00",
    ],
)
def test_bad_references(text: str) -> None:
    with pytest.raises(UsageError):
        parse_reference(text)


@pytest.mark.parametrize("text", ["Python", "docker.io/Org/app", "localhost:5000/A", "Org/app"])
def test_upper_case_has_a_hint(text: str) -> None:
    with pytest.raises(UsageError, match="upper case") as caught:
        parse_reference(text)
    assert caught.value.hint is not None
    assert caught.value.hint.islower()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("oci:/d", LayoutReference("/d")),
        ("oci:d/e:tag", LayoutReference("d/e", "tag")),
        ("oci:/a:b/c", LayoutReference("/a:b/c")),
        ("oci:/a:b/c:t", LayoutReference("/a:b/c", "t")),
        ("oci:/a/b:c:t", LayoutReference("/a/b:c", "t")),
        ("oci:/a/b:c:", LayoutReference("/a/b:c")),
        ("oci:.", LayoutReference(".")),
        (f"oci:/d@{DIGEST}", LayoutReference("/d", digest=DIGEST)),  # type: ignore[arg-type]
        ("oci:/a@b", LayoutReference("/a@b")),
    ],
)
def test_layouts(text: str, expected: LayoutReference) -> None:
    assert parse_reference(text) == expected
    assert parse_reference(str(expected)) == expected


@pytest.mark.parametrize("text", ["oci:", "oci::t", "oci:/d:b d", "oci:/d\0", "oci:/d@sha256:12"])
def test_bad_layouts(text: str) -> None:
    with pytest.raises(UsageError):
        parse_reference(text)


@given(st.text(st.sampled_from("aB0./:@-_[]\x00 %") | st.characters(), max_size=40))
def test_any_text_is_refused_or_rendered_back(text: str) -> None:
    try:
        reference = parse_reference(text)
    except UsageError:
        return
    assert parse_reference(str(reference)) == reference
    if isinstance(reference, Reference):
        assert ".." not in reference.repository.split("/")
        assert reference.repository == reference.repository.lower()
