"""Rates and delays as people write them for a line: `100mbit`, `30ms`. Pure."""

from __future__ import annotations

import re

from nsfs.errors import UsageError

_RATES = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_DELAYS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_rate(text: str) -> float:
    """Bytes a second of `text`, a number of bit, kbit, mbit or gbit, as tc(8) has them; raises UsageError."""
    return _parse(text, _RATES, "not a bandwidth: {!r}", 'write "100mbit", or 0 for no limit') / 8


def parse_delay(text: str) -> float:
    """Seconds of `text`, a number of us, ms or s; raises UsageError."""
    return _parse(text, _DELAYS, "not a round trip: {!r}", 'write "30ms", or 0 for none')


def render_rate(rate: float) -> str:
    """Bytes a second as `parse_rate` takes them."""
    bits = rate * 8
    unit = next((unit for unit in ("gbit", "mbit", "kbit") if bits >= _RATES[unit]), "bit")
    return f"{bits / _RATES[unit]:g}{unit}"


def _parse(text: str, units: dict[str, float] | dict[str, int], message: str, hint: str) -> float:
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?) ?([a-z]*)", text.strip().lower())
    if found is None or (found[2] not in units and float(found[1])):
        raise UsageError(message.format(text), hint=hint)
    return float(found[1]) * units.get(found[2], 0)
