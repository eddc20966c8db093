"""containerd's filter grammar."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsfs.errors import UsageError
from nsfs.model.filters import Operator, parse_filters

if TYPE_CHECKING:
    from collections.abc import Sequence

THING = {"name": "a", "parent": "", "labels.containerd.io/gc.root": "x,y", "labels.l": "2"}


def fields(path: Sequence[str]) -> str | None:
    return THING.get(".".join(path))


@pytest.mark.parametrize(
    ("filters", "selected"),
    [
        ([], True),
        ([""], True),
        (["name"], True),
        (["other"], False),
        (["name==a"], True),
        (["name==b"], False),
        (["name!=b"], True),
        (["name!=a"], False),
        (["other!=a"], True),
        (['other==""'], False),
        (['parent==""'], True),
        (['parent!=""'], False),
        (["name==b", "name==a"], True),
        (["name==a,labels.l==2"], True),
        (["name==a,labels.l==3"], False),
        (["labels.l"], True),
        (["labels"], False),
        (['labels."containerd.io/gc.root"=="x,y"'], True),
        (['labels."containerd.io/gc.root"~=/^x/'], True),
        (["labels.l~=|^[0-9]$|"], True),
        (["labels.l~=[0-9]"], True),
        (["labels.l~=("], False),
        (["other~=^$"], True),
        ([r'name=="\x61"'], True),
        ([r'name=="\141"'], True),
        ([r'name=="\u0061"'], True),
        (["name == a"], True),
        ([" name==a"], True),
        (['name=="b/c"'], False),
        (["name==b=c!"], False),
        (['name==b"'], False),
    ],
)
def test_selects(filters: list[str], selected: bool) -> None:
    assert parse_filters(filters).match(fields) is selected


@pytest.mark.parametrize(
    "text",
    [
        ",",
        "name,",
        "name==",
        "name=a",
        "name===a",
        "name<a",
        "name==a b",
        "name==a ",
        "name.",
        ".name",
        "name==/a/",
        "/name/==a",
        'name=="a',
        'name=="\\q"',
        'name=="\\x6"',
        'name=="\\U00110000"',
        'name=="\\400"',
        'name=="a\nb"',
        "name==a\0",
        "name==.a",
        "näme==a",
    ],
)
def test_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="not a filter"):
        parse_filters([text])


def quote(text: str) -> str:
    """As Go's strconv.Quote would."""
    return '"' + "".join(f"\\U{ord(char):08x}" if not char.isalnum() else char for char in text) + '"'


TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(name=TEXT, value=TEXT, other=TEXT)
def test_what_is_quoted_comes_back(name: str, value: str, other: str) -> None:
    filters = parse_filters([f"labels.{quote(name)}=={quote(value)}"])
    ((selector,),) = filters.alternatives
    assert selector.path == ("labels", name)
    assert selector.operator is Operator.EQUAL
    assert filters.match(lambda _path: value)
    assert filters.match(lambda _path: other) is (other == value)


@given(st.one_of(st.text(max_size=40), st.text('ab"/|\\.,=!~ x0', max_size=12)), TEXT)
def test_anything_is_a_filter_or_refused(text: str, value: str) -> None:
    try:
        filters = parse_filters([text])
    except UsageError:
        return
    filters.match(lambda _path: value)
    filters.match(lambda _path: None)
