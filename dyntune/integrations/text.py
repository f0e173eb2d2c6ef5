"""Names and events as text that every sink can store."""

from __future__ import annotations

import json

from dyntune.monitor.run import Event

__all__ = ["detail", "storable"]


def storable(name: str) -> str:
    r"""The name; a lone surrogate, which UTF-8 has no bytes for, as an escape.

    Example:
        >>> storable("λ"), storable("\ud800")
        ('λ', '\\ud800')
    """
    return name.encode(errors="backslashreplace").decode()


def detail(event: Event, **more: object) -> str:
    """What is known of an event, as JSON; what JSON has no form for as text.

    Example:
        >>> detail(Event(name="diverging", step=3, detail={"ratio": 2.5}), step=3)
        '{"step": 3, "ratio": 2.5}'
    """
    return json.dumps(more | dict(event.detail), default=str)
