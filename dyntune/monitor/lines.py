"""The format of a recorded run: one JSON object per line, valid by RFC 8259, each readable by itself.

Every record has ``kind`` and a sequence number ``seq``, which counts up by one from 0 in each file. Kinds:

- ``header``: first in the file; ``schema`` (the version of this format), ``run`` (an identifier, the same in the files
  of all processes), ``rank`` and ``world`` (which process of how many wrote it), ``torn`` and ``provenance``.
- ``column``: what a column of the rows holds: ``name``, ``unit``, ``method``, ``level``, ``covers``. Written before the
  first row that has it, and again when it changes.
- ``row``: measurements at one ``step``: ``values`` by column (an interval's ends as ``name.low`` and ``name.high``),
  ``status`` by column where it is not OK (``[name of the status, reason]``), ``labels`` (text by name).
- ``rows``: the same for ``count`` consecutive steps from ``step`` on: ``values`` by column, each a number that is the
  same at all of them, a list of one number per step, or ``{"at": [0, 2, ...], "values": [...]}`` for a column that only
  some of them have.
- ``assumed``: ``detail``: what the rows from here on assume, such as the loss, the counts and the mode.
- ``event``: ``name``, ``step`` or null, ``detail``.
- ``resumed``: a writer goes on from here. ``step``: the last one that counts, or null where nobody said; ``torn``:
  whether the line before is the piece of a record whose writer died; ``of``: the run that was resumed where it is
  another; ``provenance``.
- ``lost``: ``count`` records before this one could not be written, ``reason``.

A writer only ever appends. So a piece that was left behind is closed off by a newline, not cut off, and rows of an
attempt that a later one takes back to an earlier step stay in the file: readers sort them out.

Readers pass over kinds and fields that they do not know, so that both can be added within a schema version. JSON knows
neither NaN nor infinity: such numbers are null, and ``nonfinite`` maps the place, as JSON pointer (RFC 6901), to
``"nan"``, ``"inf"`` or ``"-inf"``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

__all__ = ["SCHEMA", "BadRecordError", "decode", "encode"]

SCHEMA = 1
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
MOST = 2**63 - 1  # steps and sequence numbers become int64
MOST_ROWS = 2**16  # of one record, so that a few damaged bytes cannot ask for all memory
MOST_RANKS = 10**6  # of which the missing ones are listed

_ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


class BadRecordError(ValueError):
    """A line is JSON, but no record."""


def encode(record: Mapping[str, Any]) -> bytes:
    r"""One record as one line, with its newline.

    Args:
        record: Plain Python values: strings, numbers, booleans, None, lists, tuples and mappings of those by text.

    Raises:
        TypeError: Something else.

    Example:
        >>> encode({"kind": "row", "seq": 1, "values": {"loss": math.inf}})
        b'{"kind":"row","seq":1,"values":{"loss":null},"nonfinite":{"/values/loss":"inf"}}\n'
    """
    try:  # nearly always finite; benchmarks/run_log.py has what formatting by hand would save: little
        return _ENCODER.encode(record).encode("ascii") + b"\n"
    except ValueError:
        pass
    flags: dict[str, str] = {}
    plain = {str(key): _plain(item, f"/{_escaped(key)}", flags) for key, item in record.items()}
    if flags:
        plain["nonfinite"] = flags
    return _ENCODER.encode(plain).encode("ascii") + b"\n"


def _escaped(key: Any) -> str:
    return str(key).replace("~", "~0").replace("/", "~1")


def _plain(item: Any, place: str, flags: dict[str, str]) -> Any:
    if isinstance(item, float) and not math.isfinite(item):
        flags[place] = "nan" if math.isnan(item) else ("inf" if item > 0 else "-inf")
        return None
    if isinstance(item, Mapping):
        return {str(key): _plain(value, f"{place}/{_escaped(key)}", flags) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [_plain(value, f"{place}/{i}", flags) for i, value in enumerate(item)]
    return item


def decode(line: bytes) -> dict[str, Any]:
    """The record in a line, checked as far as its kind is known.

    Raises:
        ValueError: It is none; the message says why. Mostly a :class:`BadRecordError`.
    """
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=_refuse)
    except RecursionError:
        raise BadRecordError("nested too deeply") from None
    if not isinstance(record, dict):
        raise BadRecordError(f"a {type(record).__name__}, not an object")
    if not isinstance(record.get("kind"), str):
        raise BadRecordError("no kind")
    if not _is_count(record.get("seq")):
        raise BadRecordError("no sequence number")
    for place, flag in _mapping(record, "nonfinite").items():
        _restore(record, place, flag)
    check = {
        "header": _check_header,
        "column": _check_column,
        "row": _check_row,
        "rows": _check_rows,
        "event": _check_event,
        "assumed": _check_detail,
        "resumed": _check_resumed,
        "lost": _check_lost,
    }
    check.get(record["kind"], lambda _: None)(record)
    return record


def _refuse(constant: str) -> None:
    raise BadRecordError(f"{constant} is not JSON")


def _is_count(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= MOST


def _mapping(record: Mapping[str, Any], field: str) -> dict[str, Any]:
    found = record.get(field, {})
    if not isinstance(found, dict):
        raise BadRecordError(f"{field} is no object")
    return found


def _restore(record: Any, place: Any, flag: Any) -> None:
    """Put back a number that JSON could not hold; only where there is a null."""
    *path, last = [part.replace("~1", "/").replace("~0", "~") for part in str(place).split("/")[1:]] or [""]
    try:
        for part in path:
            record = record[int(part)] if isinstance(record, list) else record[part]
        key = int(last) if isinstance(record, list) else last
        if record[key] is not None:
            raise BadRecordError(f"nonfinite: {place!r} is not null")
        record[key] = NON_FINITE[flag]
    except (KeyError, IndexError, TypeError) as error:
        raise BadRecordError(f"nonfinite: no place {place!r} or no value {flag!r}") from error


def _check_header(record: dict[str, Any]) -> None:
    if not _is_count(record.get("schema")):
        raise BadRecordError("header without schema")
    if not isinstance(record.get("run", ""), str):
        raise BadRecordError("run is no text")
    rank, world = record.get("rank", 0), record.get("world", 1)
    if not (_is_count(rank) and _is_count(world) and rank < world <= MOST_RANKS):
        raise BadRecordError("rank or world makes no sense")
    _check_torn(record)
    _mapping(record, "provenance")


def _check_column(record: dict[str, Any]) -> None:
    if not isinstance(record.get("name"), str):
        raise BadRecordError("column without a name")
    level = record.get("level")
    if not (level is None or isinstance(level, (int, float))):
        raise BadRecordError("level is no number")
    if not all(isinstance(record.get(field, ""), str) for field in ("unit", "method", "covers")):
        raise BadRecordError("unit, method or covers is no text")


def _check_row(record: dict[str, Any]) -> None:
    if not _is_count(record.get("step")):
        raise BadRecordError("row without a step")
    for name, item in _mapping(record, "values").items():
        if isinstance(item, bool) or not isinstance(item, (int, float, type(None))):
            raise BadRecordError(f"value of {name!r} is no number")
    for name, item in _mapping(record, "status").items():
        if not (isinstance(item, list) and len(item) == 2 and all(isinstance(text, str) for text in item)):
            raise BadRecordError(f"status of {name!r} is no pair of texts")
    if not all(isinstance(text, str) for text in _mapping(record, "labels").values()):
        raise BadRecordError("a label is no text")


def _check_rows(record: dict[str, Any]) -> None:
    step, count = record.get("step", -1), record.get("count", -1)
    if not (_is_count(step) and _is_count(count) and 0 < count <= MOST_ROWS and step + count <= MOST):
        raise BadRecordError("rows without a step, or of a count that makes no sense")
    for name, item in _mapping(record, "values").items():
        numbers, expected = item, count
        if isinstance(item, dict):
            at, numbers = item.get("at"), item.get("values")
            if not (isinstance(at, list) and isinstance(numbers, list) and at and all(map(_is_count, at))):
                raise BadRecordError(f"places or values of {name!r} are no lists")
            if at[-1] >= count or any(b <= a for a, b in pairwise(at)):
                raise BadRecordError(f"places of {name!r} do not ascend below {count}")
            expected = len(at)
        elif not isinstance(item, list):
            numbers, expected = [item], 1
        if len(numbers) != expected:
            raise BadRecordError(f"{name!r} has {len(numbers)} values for {expected} rows")
        if any(isinstance(n, bool) or not isinstance(n, (int, float, type(None))) for n in numbers):
            raise BadRecordError(f"a value of {name!r} is no number")


def _check_event(record: dict[str, Any]) -> None:
    if not isinstance(record.get("name"), str):
        raise BadRecordError("event without a name")
    if record.get("step") is not None and not _is_count(record["step"]):
        raise BadRecordError("step is no count")
    _check_detail(record)


def _check_detail(record: dict[str, Any]) -> None:
    _mapping(record, "detail")


def _check_resumed(record: dict[str, Any]) -> None:
    if record.get("step") is not None and not _is_count(record["step"]):
        raise BadRecordError("step is no count")
    _check_torn(record)
    if not isinstance(record.get("of", ""), str):
        raise BadRecordError("of is no text")
    _mapping(record, "provenance")


def _check_torn(record: dict[str, Any]) -> None:
    if not isinstance(record.get("torn", False), bool):
        raise BadRecordError("torn is neither true nor false")


def _check_lost(record: dict[str, Any]) -> None:
    if not _is_count(record.get("count")):
        raise BadRecordError("lost without a count")
    if not isinstance(record.get("reason", ""), str):
        raise BadRecordError("reason is no text")
