"""Ctrl-C for programs that start servers: it reaches the program alone, once, and never what the program started.

A terminal sends SIGINT to its whole foreground process group: servers would end before what they serve is unmounted. So
the work is done in a session of its own, and the process that the terminal knows only passes signals on.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

INTERRUPTED = 130


def run_apart(work: Callable[[], int]) -> NoReturn:
    """Do `work` in a session of its own; exit with what it returns, or with 130 once it has cleaned up after Ctrl-C."""
    sys.stdout.flush()
    sys.stderr.flush()
    worker = os.fork()
    if worker == 0:
        _work(work)

    def pass_on(_number: int, _frame: FrameType | None) -> None:
        os.kill(worker, signal.SIGINT)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    _, status = os.waitpid(worker, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


def _work(work: Callable[[], int]) -> NoReturn:
    os.setsid()
    signal.signal(signal.SIGINT, _interrupt)
    status = 1
    try:
        status = work()
    except KeyboardInterrupt:
        print("interrupted; everything is cleaned up", file=sys.stderr)
        status = INTERRUPTED
    except BaseException:  # noqa: BLE001  this process ends here, and not in its parent's code
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Interrupt once; cleaning up is not interrupted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
