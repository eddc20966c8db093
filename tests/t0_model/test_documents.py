"""What the documents say of the code can be looked up in it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import click
import pytest

from nsfs import errors
from nsfs.cli.app import nsfs
from nsfs.cli.exits import EXITS
from nsfs.serve.config import known_keys
from nsfs.serve.doctor import FEATURES
from nsfs.store import crypt, index, keys, layers, layout, poolfiles, sealed

REPOSITORY = Path(__file__).parents[2]
SOURCE = REPOSITORY / "src/nsfs"
DOCUMENTS = [REPOSITORY / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md")]
DOCUMENTS += sorted((REPOSITORY / "docs").glob("*.md"))
README = (REPOSITORY / "README.md").read_text()
THREATS = (REPOSITORY / "docs/threat-model.md").read_text()
ON_DISK = (REPOSITORY / "docs/on-disk.md").read_text()
CONFIG = (REPOSITORY / "contrib/config.toml").read_text()


def _rows(text: str, head: str) -> list[tuple[str, ...]]:
    """The cells of the table whose first line begins with `head`."""
    lines = text[text.index(f"\n| {head} |") + 1 :].splitlines()[2:]
    table = lines[: next((n for n, line in enumerate(lines) if not line.startswith("|")), None)]
    return [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in table]


def _command(name: str) -> click.Command:
    assert isinstance(nsfs, click.Group)
    command = nsfs.get_command(click.Context(nsfs), name)
    assert command is not None, f"no such command: nsfs {name}"
    return command


def _below(command: click.Command, words: list[str]) -> click.Command:
    """A group's own command, where one is named behind it."""
    if not isinstance(command, click.Group) or not words:
        return command
    found = command.get_command(click.Context(command), words[0])
    assert found is not None, f"no such command: nsfs {command.name} {words[0]}"
    return found


def _options(command: click.Command) -> set[str]:
    return {option for param in command.params for option in param.opts} | {"--help", "-h"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_reader_can_follow(document: Path) -> None:
    """No line that wraps in a terminal, tables aside; no trailing blanks."""
    for number, line in enumerate(document.read_text().splitlines(), 1):
        assert line == line.rstrip(), number
        assert len(line) <= 120 or line.startswith("|"), number


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_every_command_that_the_readme_shows_exists() -> None:
    prose, *blocks = README.split("```\n")
    prose += "".join(blocks[1::2])
    shown = re.findall(r"^nsfs (\w+)(.*)$", "".join(blocks[::2]), re.MULTILINE) + re.findall(
        r"`nsfs (\w+)(.*?)`", prose
    )
    assert len(shown) > 10
    for name, rest in shown:
        unknown = set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", rest.partition("#")[0])) - _options(
            _below(_command(name), rest.split())
        )
        assert not unknown, f"nsfs {name} {rest}"


def test_the_readme_names_every_command() -> None:
    assert isinstance(nsfs, click.Group)
    for name in nsfs.list_commands(click.Context(nsfs)):
        assert f"nsfs {name}" in README


def test_exit_codes_are_those_of_the_errors() -> None:
    rows = [(int(code), meaning) for code, meaning in _rows(README, "code")]
    assert rows == list(EXITS)
    assert errors.__doc__ is not None
    listed = [int(code) for code in re.findall(r"\b(\d) [a-z]", errors.__doc__[errors.__doc__.index("Exit codes") :])]
    assert listed == [code for code, _ in EXITS if code < 10]
    used = {cls.exit_code for cls in errors.ERRORS.values()} | {errors.NsfsError.exit_code}
    assert used | {0} == set(listed)


def test_the_kernels_features_are_those_that_the_doctor_tries() -> None:
    rows = _rows(README, "feature")
    known = [(feature.name, feature.since, feature.without) for feature in FEATURES if feature.since]
    assert sorted(rows) == sorted(known)
    releases = [[int(number) for number in since.split(".")] for _, since, _ in rows]
    assert releases == sorted(releases)


def test_every_key_of_the_configuration_is_documented() -> None:
    assert "contrib/config.toml" in README
    said: set[str] = set()
    table, comment = "", False
    for line in CONFIG.splitlines():
        if found := re.fullmatch(r"\[(\w+)\]", line):
            table = f"{found[1]}."
        elif found := re.match(r"(\w+) = ", line):
            assert comment, f"nothing is said of it: {table}{found[1]}"
            said.add(table + found[1])
        comment = line.startswith("#")
    assert said == set(known_keys())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_keys_that_documents_name_exist(document: Path) -> None:
    tables = {key.partition(".")[0] for key in known_keys() if "." in key}
    named = re.findall(rf"`((?:{'|'.join(sorted(tables))})\.\w+)`", document.read_text())
    assert set(named) <= set(known_keys())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        name, _, anchor = target.partition("#")
        if name.startswith("http"):
            continue
        found = document.parent / name if name else document
        assert found.exists(), target
        assert not anchor or anchor in _anchors(found), target


def _anchors(document: Path) -> set[str]:
    """What a heading is linked by: lower case, without punctuation, dashes for blanks."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


_POINTER = r"`([a-z0-9_/]+\.py)(?::([\w.]+))?`"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_pointers_into_the_code_lead_somewhere(document: Path) -> None:
    for path, name in re.findall(_POINTER, document.read_text()):
        module = (REPOSITORY if path.startswith("tests/") else SOURCE) / path
        assert module.exists(), path
        if name:
            _find(ast.parse(module.read_text()), name, path)


def test_every_promise_is_tested() -> None:
    promises = [row for part in THREATS.split("\n## ") if "\n| promise |" in part for row in _rows(part, "promise")]
    assert len(promises) > 10
    for promise, tests in promises:
        found = re.findall(_POINTER, tests)
        assert found, promise
        assert all(path.startswith("tests/") and "test_" in name for path, name in found), promise


def _find(module: ast.Module, name: str, path: str) -> None:
    scope: ast.AST = module
    for part in name.split("."):
        found = [node for node in ast.iter_child_nodes(scope) if part in _names(node)]
        assert found, f"{path} has no {name}"
        scope = found[0]


def _names(node: ast.AST) -> list[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def test_every_module_says_what_it_is_in_a_few_lines() -> None:
    for path in SOURCE.rglob("*.py"):
        if path.name.endswith("_pb2.py"):
            continue
        said = ast.get_docstring(ast.parse(path.read_text()))
        assert said, path
        assert len(said.splitlines()) <= 12, path


def test_every_file_on_disk_is_described() -> None:
    domain = layout.DomainLayout("/d")
    for name in (domain.disk, domain.present, domain.index, domain.tag, domain.layers, domain.lock):
        assert name.removeprefix("/d/") in ON_DISK
    for name in (layers.INDEX_FILE, layers.SEGMENTS_FILE, layers.SPANS_FILE, "blob.partial", "map-"):
        assert name in ON_DISK
    whole = layout.Layout("/root", "/run")
    for path in (whole.key("x"), whole.meta, whole.socket, whole.lock, whole.lowers, whole.upper("x")):
        assert f"{path.split('/')[2]}" in ON_DISK


def test_the_index_is_described() -> None:
    rows = {row[0].strip("`"): row[1:] for row in _rows(ON_DISK, "database")}
    assert set(rows) == set(index._Databases._fields)
    assert f"{index.PLAIN_VERSION}, or {index.VERSION} where" in rows["about"][1]


def test_headers_are_described() -> None:
    magics = (poolfiles._DISK_MAGIC, poolfiles._BITS_MAGIC, layers._INDEX_MAGIC, layers._SEGMENTS_MAGIC)
    for magic in (*magics, layers._SPANS_MAGIC, sealed._MAGIC):
        assert f"`{magic.decode()}`" in ON_DISK
    assert f"header of {layers._HEADER.size} bytes" in ON_DISK
    assert f"begin with {sealed.HEADER_SIZE} bytes" in ON_DISK
    assert f"up to {keys._FILE:,} bytes" in ON_DISK
    ends = [int(offset) + int(size) for offset, size, *_ in _rows(ON_DISK, "offset")]
    assert ends[-1] == poolfiles._CHECK_AT + crypt.CHECK_SIZE
    for name in layers._COLUMNS:
        assert f"*{name}*" in ON_DISK


def test_versions_are_described() -> None:
    assert {poolfiles.PLAIN_VERSION, layers.VERSION, index.PLAIN_VERSION, keys.VERSION, sealed.VERSION} == {1}
    assert {poolfiles.VERSION, index.VERSION} == {2}
    assert "a format version: 1, and 2 of a disk and an index under a key" in ON_DISK
