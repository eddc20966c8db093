"""Work that is done beside: by a child where there can be one, and here where not; no child is left."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import pytest

from nsfs.errors import CorruptError
from nsfs.serve.beside import beside

_HEAD = """
import os, signal, time
from nsfs.serve.beside import beside
here = os.getpid()
def pid():
    return [str(os.getpid()).encode()]
"""


def run_alone(script: str) -> str:
    """What a process of one thread says."""
    command = [sys.executable, "-c", _HEAD + textwrap.dedent(script)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60)
    return done.stdout.strip()


def test_a_child_does_it_and_is_gone() -> None:
    script = """
    with beside(lambda: [*pid(), bytes(9 << 20)]) as take:
        done = take()
    try:
        os.waitpid(-1, 0)
    except ChildProcessError:
        print(int(done[0]) != here, len(done[1]))
    """
    assert run_alone(script) == f"True {9 << 20}"


@pytest.mark.parametrize("end", ["os._exit(3)", "os.kill(os.getpid(), signal.SIGKILL)", "int('x')"])
def test_what_a_child_fails_at_is_done_here(end: str) -> None:
    script = f"""
    def work():
        if os.getpid() != here:
            {end}
        return pid()
    with beside(work) as take:
        print(int(take()[0]) == here)
    """
    assert run_alone(script) == "True"


def test_who_does_not_wait_leaves_no_child() -> None:
    script = """
    try:
        with beside(lambda: time.sleep(600)):
            raise KeyError
    except KeyError:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            print("none")
    """
    assert run_alone(script) == "none"


def test_a_process_of_several_threads_forks_none() -> None:
    let = threading.Event()
    other = threading.Thread(target=let.wait)
    other.start()
    try:
        with beside(lambda: [str(os.getpid()).encode()]) as take:
            assert take() == [str(os.getpid()).encode()]
    finally:
        let.set()
        other.join()


def test_what_cannot_be_done_raises_here() -> None:
    def work() -> list[bytes]:
        raise CorruptError("nothing can be made of it")

    with beside(work) as take, pytest.raises(CorruptError, match="nothing can be made of it"):
        take()
