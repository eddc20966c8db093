"""containerd's filter grammar (pkg/filters, containerd 1.6 to 2.x): parser and matcher. Pure.

    filters   := filter*                                 any of them matches; none at all matches everything
    filter    := [selector ("," selector)*]              all of them match; the empty one matches everything
    selector  := fieldpath [("==" | "!=" | "~=") value]  without an operator: the field is there
    fieldpath := field ("." field)*
    field     := [A-Za-z0-9_]+ | quoted
    value     := quoted | what has neither blank nor comma

Quoted is a Go string in double quotes; a regular expression may have slashes or bars around it instead. A field that
is not there is unequal to everything, and to a regular expression it is empty.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nsfs.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Fields = Callable[[Sequence[str]], str | None]


class Operator(enum.StrEnum):
    """How a field is compared."""

    PRESENT = ""
    EQUAL = "=="
    UNEQUAL = "!="
    MATCHES = "~="


@dataclass(frozen=True, slots=True)
class Selector:
    """One comparison."""

    path: tuple[str, ...]
    operator: Operator
    value: str = ""

    def matches(self, fields: Fields) -> bool:
        """Whether it holds for a thing with these fields."""
        found = fields(self.path)
        match self.operator:
            case Operator.PRESENT:
                return found is not None
            case Operator.EQUAL:
                return found == self.value
            case Operator.UNEQUAL:
                return (found or "") != self.value
            case Operator.MATCHES:
                return _search(self.value, found or "")


@dataclass(frozen=True, slots=True)
class Filters:
    """Alternatives, each a list of selectors that must all hold."""

    alternatives: tuple[tuple[Selector, ...], ...]

    def match(self, fields: Fields) -> bool:
        """Whether a thing is selected; `fields` gives the value at a path, None where there is none."""
        if not self.alternatives:
            return True
        return any(all(each.matches(fields) for each in selectors) for selectors in self.alternatives)


def parse_filters(texts: Sequence[str]) -> Filters:
    """Read filters; raises UsageError with the place that is wrong."""
    return Filters(tuple(_Parser(text).selectors() if text else () for text in texts))


def _search(pattern: str, value: str) -> bool:
    """A pattern that is no regular expression matches nothing."""
    try:
        return re.search(pattern, value) is not None
    except (re.error, OverflowError, RecursionError):
        return False


_BLANKS: Final = re.compile(r"\s*")
_FIELD: Final = re.compile(r"[A-Za-z0-9_]+")
_OPERATOR: Final = re.compile(r"[=!~]+")
_VALUE: Final = re.compile(r"[^\s,.=!~\"/|][^\s,]*")
_ESCAPE: Final = r"\\(?:[abfnrtv\\%s]|[0-3][0-7]{2}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8})"
_QUOTED: Final = {
    quote: re.compile(rf"{re.escape(quote)}((?:[^\n\\{quote}]|{_ESCAPE % quote})*){re.escape(quote)}")
    for quote in '"/|'
}
_ESCAPED: Final = re.compile(r"\\([0-7]{3}|x..|u.{4}|U.{8}|.)")
_NAMED: Final = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11}


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        if "\0" in text:
            self._at = text.index("\0")
            raise self._error("unexpected null")

    def selectors(self) -> tuple[Selector, ...]:
        found = [self._selector()]
        while self._at < len(self._text):
            if self._peek() != ",":
                raise self._error("expected a comma")
            self._at += 1
            found.append(self._selector())
        return tuple(found)

    def _selector(self) -> Selector:
        path = [self._field()]
        while self._peek() == ".":
            self._at += 1
            path.append(self._field())
        if self._peek() in {",", ""}:
            return Selector(tuple(path), Operator.PRESENT)
        operator = self._operator()
        value = self._quoted('"/|' if operator is Operator.MATCHES else '"')
        if value is None:
            value = self._take(_VALUE, "expected a value")
        return Selector(tuple(path), operator, value)

    def _field(self) -> str:
        self._take(_BLANKS, "")
        quoted = self._quoted('"')
        return self._take(_FIELD, "expected a field") if quoted is None else quoted

    def _operator(self) -> Operator:
        self._take(_BLANKS, "")
        start = self._at
        text = self._take(_OPERATOR, "expected an operator: ==, != or ~=")
        self._take(_BLANKS, "")
        if text not in {Operator.EQUAL, Operator.UNEQUAL, Operator.MATCHES}:
            self._at = start
            raise self._error("unsupported operator")
        return Operator(text)

    def _quoted(self, quotes: str) -> str | None:
        quote = self._peek()
        if not quote or quote not in quotes:
            return None
        found = _QUOTED[quote].match(self._text, self._at)
        if found is None:
            raise self._error("malformed quotes")
        self._at = found.end()
        return self._unescape(found[1])

    def _unescape(self, text: str) -> str:
        """Numbers up to 255 are bytes, as in Go; what is then no UTF-8 equals no field."""
        parts, end = bytearray(), 0
        for found in _ESCAPED.finditer(text):
            parts += text[end : found.start()].encode(errors="surrogatepass") + self._character(found[1])
            end = found.end()
        parts += text[end:].encode(errors="surrogatepass")
        return parts.decode(errors="surrogateescape")

    def _character(self, code: str) -> bytes:
        if code in _NAMED:
            return bytes([_NAMED[code]])
        if code[0] in "uU":
            number = int(code[1:], 16)
            if number > 0x10FFFF:
                raise self._error("no such character")
            return chr(number).encode(errors="replace" if 0xD800 <= number < 0xE000 else "strict")
        if code[0] == "x" and len(code) == 3:
            return bytes([int(code[1:], 16)])
        return bytes([int(code, 8)]) if code[0] in "01234567" else code.encode()

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self, pattern: re.Pattern[str], otherwise: str) -> str:
        found = pattern.match(self._text, self._at)
        if found is None:
            raise self._error(otherwise)
        self._at = found.end()
        return found[0]

    def _error(self, message: str) -> UsageError:
        before, after = self._text[: self._at][-200:], self._text[self._at :][:200]
        return UsageError(f"not a filter: {message} after {before!r}, before {after!r}")
