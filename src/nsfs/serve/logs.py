"""The daemon's log: lines on stderr, as text or as JSON objects, for it and every process it forks."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from nsfs.errors import NsfsError

if TYPE_CHECKING:
    from collections.abc import Iterator

_TALKATIVE: Final = ("httpx", "httpcore")
"""They log URLs and headers: signatures of redirects, tokens, passwords. Their warnings have none."""


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__(
            "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s[%(process)d]: %(message)s", "%Y-%m-%dT%H:%M:%S"
        )


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class Bugs(logging.Handler):
    """Counts what is logged with an exception that is no NsfsError."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler, which lets in one thread at a time."""
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, NsfsError):
            self.count += 1


@contextmanager
def counted_bugs() -> Iterator[Bugs]:
    """Those of this process, for as long as the block lasts."""
    bugs = Bugs()
    logging.getLogger().addHandler(bugs)
    try:
        yield bugs
    finally:
        logging.getLogger().removeHandler(bugs)


def start_logging(form: str, level: str) -> None:
    """Log to stderr from `level` on; `form` is text or json. Called once per process that logs, before it forks."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
