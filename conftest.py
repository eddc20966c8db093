"""What all tests need of pytest and hypothesis.

`make test` runs them in two processes, each file's in one of them (pytest-xdist), and `pytest tests/x.py` in one. So a
test looks only at mounts, processes, cgroups and devices that it made itself, and gives what it makes a name that no
other test has; what two cannot have at a time is used under `prepared.alone`.
"""

import signal

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["prepared"]

# A loaded machine is slow, and a directory of a test serves all its examples where it says so.
settings.register_profile(
    "nsfs", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("nsfs")


def pytest_configure(config: pytest.Config) -> None:
    """What holds for every process of tests."""
    _keep_ctrl_c()
    if hasattr(config, "workerinput"):
        config.option.basetemp = config.option.basetemp.replace("popen-gw", "")  # a socket's name has 107 bytes


def _keep_ctrl_c() -> None:
    """Where a shell runs tests in the background, what they start would ignore Ctrl-C with it (POSIX, sh, 2.11)."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
