"""Process groups of our own: made by all processes or by none, given up by all as soon as one gives up.

torch counts the groups that a process makes, and names them by the count. If one process made a group alone, every
later group of the user's would go by different names on different processes, and wait for ever. So the processes meet
first, in the store by which the job's processes found each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

__all__ = ["give_up", "is_broken_off", "meet", "own_group"]

# gloo raises plain RuntimeErrors; these are from its texts (torch 2.13).
_BROKEN_OFF = (
    "gloo/transport",
    "Timed out waiting",
    "Connection closed by peer",
    "Connection reset by peer",
    "Application timeout caused pair closure",
)


@dataclass
class _Held:
    """A group, the job that it belongs to, its name in the job's store, and how many like it came before."""

    group: Any
    world: Any
    name: str
    turn: int

    def usable(self) -> bool:
        """Whether no process has given it up, in this job."""
        return self.world is dist.group.WORLD and self.group is not None and not _store().check([f"{self.name}/over"])


_held: dict[tuple[Any, ...], _Held] = {}


def own_group(ranks: tuple[int, ...], timeout: float, purpose: str) -> Any:
    """The group of these processes with this timeout: one per job and purpose, made anew after it was given up.

    Raises:
        RuntimeError: Not all came within the timeout.
    """
    key = (ranks, timeout, purpose)
    held = _held.get(key)
    if held is not None and held.usable():
        return held.group
    turn = 0 if held is None else held.turn + 1  # also in another job: its store may be the same
    name = f"dyntune/{key}/{turn}"
    meet(_store(), name, ranks.index(dist.get_rank()), len(ranks), timeout)
    group = dist.new_group(
        list(ranks),
        timeout=timedelta(seconds=timeout),
        use_local_synchronization=len(ranks) < dist.get_world_size(),
        group_desc=f"dyntune, {purpose}",
    )
    _held[key] = _Held(group, dist.group.WORLD, name, turn)
    return group


def give_up(ranks: tuple[int, ...], timeout: float, purpose: str) -> None:
    """Close this process's connections: others that wait for it get an error, and none uses the group again."""
    held = _held.get((ranks, timeout, purpose))
    if held is None or held.group is None or held.world is not dist.group.WORLD:
        return
    group, held.group = held.group, None
    with contextlib.suppress(RuntimeError, ValueError):  # of one that does not close there is nothing more to be had
        _store().set(f"{held.name}/over", "1")
        dist.destroy_process_group(group)


def meet(store: Any, name: str, rank: int, size: int, timeout: float) -> None:
    """Wait until all processes are here; then all go on, or none does.

    Who is here stands in one entry of the store, which is changed by compare-and-set: whoever comes last completes it,
    and nobody withdraws from an entry that is complete.

    Args:
        store: Of torch.distributed.
        name: The same on all processes, and used once.
        rank: This process's place among them.
        size: How many they are.
        timeout: Seconds to wait.

    Raises:
        RuntimeError: Not all came.
    """
    everybody = set(range(size))

    def change(wanted: Callable[[set[int]], set[int]], guess: set[int]) -> set[int]:
        """The entry after it was changed, or as it is if it is complete."""
        while True:
            after = everybody if guess == everybody else wanted(guess)
            found = _read(store.compare_set(f"{name}/here", _written(guess), _written(after)))
            if found == after:
                return after
            guess = found

    if change(lambda here: here | {rank}, set()) == everybody:
        store.set(f"{name}/all", "1")
        return
    try:
        store.wait([f"{name}/all"], timedelta(seconds=timeout))
    except RuntimeError as error:  # the store's own timeout
        here = change(lambda here: here - {rank}, everybody)
        if here != everybody:
            missing = sorted(everybody - here - {rank})
            raise RuntimeError(f"processes {missing} of {size} did not come") from error


def _written(places: set[int]) -> str:
    return ",".join(map(str, sorted(places)))


def _read(entry: bytes) -> set[int]:
    return {int(place) for place in entry.decode().split(",") if place}


def is_broken_off(error: BaseException) -> bool:
    """Whether an exception of torch's says that communication ended."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _BROKEN_OFF)
    )


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
