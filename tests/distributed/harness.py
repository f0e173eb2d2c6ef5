"""Processes of a small job, started once for many cases: each case is a function that all of them run.

Starting a process costs seconds (torch is imported), running a case milliseconds. A fork server imports once, and from
then on a process costs a fork: so a job whose processes were killed is simply made anew.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Job", "Outcome"]

# Seconds. A case takes one or two on a busy machine; the watchdog is there for those that hang.
WATCHDOG = 60.0
# The user's own process group: longer than any timeout that the cases give to dyntune, shorter than the watchdog.
USERS_TIMEOUT = 40.0


@dataclass(frozen=True)
class Outcome:
    """What a case came to on one process: what it returned, or the traceback of what it raised, or neither (killed)."""

    value: Any = None
    error: str = ""
    lost: bool = False


def _serve(rank: int, size: int, port: int, calls: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=USERS_TIMEOUT))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=USERS_TIMEOUT))
    while (call := calls.recv()) is not None:
        function, arguments = call
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                outcome = Outcome(value=function(*arguments))
        except BaseException:
            outcome = Outcome(error=traceback.format_exc())
        calls.send(outcome)
    os._exit(0)  # groups that a case has broken would be waited for


class Job:
    """`size` processes with gloo on this machine; a context manager.

    The store lives here, as with torchrun: any process may die without taking it along.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._members: list[tuple[Any, Connection]] = []

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.distributed.problem"])
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.size, self._store.port, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))

    def stop(self) -> None:
        """End all processes."""
        for process, calls in self._members:
            process.kill()
            process.join()
            calls.close()
        self._members = []

    def outcomes(self, function: Callable[..., Any], *arguments: Any, watchdog: float = WATCHDOG) -> list[Outcome]:
        """Run ``function(*arguments)`` on every process; one that is still at it when the watchdog barks is killed."""
        if not self._members:
            self._start()
        for _, calls in self._members:
            calls.send((function, arguments))
        found: dict[int, Outcome] = {}
        deadline = time.monotonic() + watchdog
        while len(found) < self.size:
            open_ = {calls: rank for rank, (_, calls) in enumerate(self._members) if rank not in found}
            ready = wait(list(open_), timeout=max(0.0, deadline - time.monotonic()))
            for calls in ready:
                try:
                    found[open_[calls]] = calls.recv()  # type: ignore[index, union-attr]
                except (EOFError, ConnectionError):
                    found[open_[calls]] = Outcome(lost=True)  # type: ignore[index]
            if not ready:
                late = sorted(open_.values())
                self.stop()
                errors = "\n".join(o.error for o in found.values() if o.error)
                raise TimeoutError(f"ranks {late} were still busy after {watchdog:g} s (a hang)\n{errors}")
        if any(o.lost for o in found.values()):
            self.stop()
        return [found[rank] for rank in range(self.size)]

    def run(self, function: Callable[..., Any], *arguments: Any, watchdog: float = WATCHDOG) -> list[Any]:
        """What the function returned on every process.

        Raises:
            AssertionError: It raised on one of them, with all tracebacks.
        """
        found = self.outcomes(function, *arguments, watchdog=watchdog)
        bad = [f"rank {rank}: {o.error or 'killed'}" for rank, o in enumerate(found) if o.error or o.lost]
        if bad:
            self.stop()  # what the others are waiting for is anybody's guess
            raise AssertionError("\n".join(bad))
        return [o.value for o in found]
