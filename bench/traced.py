"""`python -m bench.traced serve …`: a daemon whose workers log each read that the kernel sends them, and its answer.

A line is `read` or `served`, seconds of the monotonic clock, view, address, size, and at `read` the layers that are
asked, in their order; `bench.replay` parses it. For recording starts alone, as a line for each read takes its time.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import TYPE_CHECKING

from bench import REPOSITORY
from nsfs.core import fetcher

if TYPE_CHECKING:
    from nsfs.core.fetchview import View

_OURS = {REPOSITORY, os.path.join(REPOSITORY, "tests")}

log = logging.getLogger(__name__)


class _Traced(fetcher.Fetcher):
    """Says what it is asked."""

    async def read(self, view: View, address: int, size: int, *, patience: float | None) -> bytes | memoryview:
        layers = ",".join(source.key for source in view.sources)
        log.info("read %.6f %s %d %d %s", time.monotonic(), view.name, address, size, layers)
        try:
            return await super().read(view, address, size, patience=patience)
        finally:
            log.info("served %.6f %s %d %d", time.monotonic(), view.name, address, size)


def trace() -> None:
    """Have this process, and those that it forks, open such fetchers."""
    fetcher.Fetcher = _Traced  # type: ignore[misc]


def main() -> None:
    """As `nsfs`."""
    from nsfs import daemon  # noqa: PLC0415  not in a fork server: it brings threads
    from nsfs.cli import app  # noqa: PLC0415

    daemon._WARM.append("bench.traced:trace")  # noqa: SLF001  nobody else wants other workers
    sys.path = [path for path in sys.path if path not in _OURS]  # workers see what is left
    app.main()


if __name__ == "__main__":
    main()
