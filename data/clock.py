"""Spans of time, as every table, panel and page writes them."""


def clock(seconds: float | None) -> str:
    """At most six characters: 12s, 3m04s, 1h02m, 4d03h; a dash for none."""
    if seconds is None:
        return "–"
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    if seconds < 100 * 3600:
        return f"{seconds // 3600}h{seconds // 60 % 60:02}m"
    return f"{seconds // 86400}d{seconds // 3600 % 24:02}h"
