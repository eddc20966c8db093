"""A real registry for the whole folder, and a meter in front of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from meter import Meter
from mounting import arena
from registry import Registry, run_registry

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["arena"]


@pytest.fixture(scope="session")
def registry() -> Iterator[Registry]:
    with run_registry() as running:
        yield running


@pytest.fixture
def meter(registry: Registry) -> Iterator[Meter]:
    """What passes it is counted; nothing that another test has asked for is."""
    with Meter(registry.host) as metering:
        yield metering
