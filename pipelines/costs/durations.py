"""Durations as people write and read them: "20m", "1 h 30 min"."""

from __future__ import annotations

import re

from nayer_edge.errors import UsageError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str, option: str = "--budget") -> float:
    """Parses a duration into seconds: "90s", "20m", "1h", "1h30m", "1.5h" or "2d".

    Args:
        option: the option that it belongs to, for the error.

    Raises:
        UsageError: not such a duration, zero, or 366 days and more.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip().lower())
    whole = "".join(number + unit for number, unit in parts)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not parts or whole != re.sub(r"\s", "", text.strip().lower()) or not 0 < seconds < 366 * _UNITS["d"]:
        raise UsageError(f"'{text}' is not a duration.", fix=f"For example: {option} 20m, {option} 1h30m")
    return seconds


def duration(seconds: float) -> str:
    """A rounded, readable duration: "50 s", "12 min", "1 h 30 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 and minutes < 600 else f"{round(minutes / 60)} h"


def typed(seconds: float) -> str:
    """A duration as an option takes it: "90s", "20m", "2h"."""
    whole = max(1, round(seconds))
    for unit, size in (("h", 3600), ("m", 60)):
        if whole % size == 0:
            return f"{whole // size}{unit}"
    return f"{whole}s"
