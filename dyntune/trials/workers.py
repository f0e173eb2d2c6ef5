"""Trials over processes of this machine, each with one thread."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from types import TracebackType

import torch

from dyntune.errors import InvalidArgumentError
from dyntune.trials.outcome import Key, Outcome, TrialFunction, tried

__all__ = ["Workers"]

# Seconds that a process that has closed its end gets to exit: only the code it exits with depends on it.
LAST_WORDS = 5.0
INSTEAD = "Use functions and classes of an importable module, or pass workers=0 to stay in this process."


def _serve(calls: Connection, dtype: torch.dtype) -> None:
    """One process: take the function, say how that went, then run trials until the other end closes."""
    # Ctrl-C reaches the whole process group; the process that was asked ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    try:
        try:
            function: TrialFunction = pickle.loads(calls.recv_bytes())
        except Exception as error:
            calls.send_bytes(f"{type(error).__name__}: {error}".encode())
            return
        calls.send_bytes(b"")
        while True:
            point, seed = json.loads(calls.recv_bytes())
            calls.send_bytes(json.dumps(asdict(tried(function, (point, seed)))).encode())
    except (EOFError, OSError):
        return


class _Worker:
    """A process and the trial that it is at.

    Args:
        payload: The pickled function.
    """

    def __init__(self, payload: bytes) -> None:
        # A forked process would inherit torch's threads and an initialised CUDA, neither of which survives that.
        context = multiprocessing.get_context("spawn")
        self.calls, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, torch.get_default_dtype()), daemon=True)
        self.process.start()
        theirs.close()
        self.payload: bytes | None = payload
        self.ready = False
        self.key: Key | None = None

    def send(self, message: bytes) -> None:
        with suppress(OSError):  # it died, which is found when its answer is read
            self.calls.send_bytes(message)

    def receive(self) -> bytes | None:
        """The answer; None where the process died without one."""
        try:
            return self.calls.recv_bytes() if self.calls.poll() else None
        except (EOFError, OSError):
            return None

    def end(self) -> None:
        """End the process, whatever it is at."""
        self.process.kill()
        self.process.join()
        self.calls.close()

    def died(self) -> str:
        """How a process ended that closed its end, in words."""
        self.process.join(timeout=LAST_WORDS)
        code = self.process.exitcode
        self.end()
        if code is None or code >= 0:
            return "it stopped answering" if code is None else f"exit code {code}"
        name = signal.Signals(-code).name
        return f"{name}, as when memory runs out" if -code == signal.SIGKILL else name


class Workers:
    """`count` spawned processes that run one function; a context manager, at whose end they are gone.

    Args:
        function: Picklable.
        count: How many processes, > 0.

    Raises:
        InvalidArgumentError: The function cannot be sent to another process, or no process can be started with it.

    Cost:
        A process imports torch (seconds) and holds a copy of what the function holds.
    """

    def __init__(self, function: TrialFunction, count: int) -> None:
        self._count = count
        try:
            # The plain pickle: multiprocessing's own would move the user's tensors into shared memory.
            self._payload = pickle.dumps(function)
        except Exception as error:
            raise InvalidArgumentError(
                f"workers={count}: what is to be run cannot be sent to another process ({type(error).__name__}: "
                f"{error}). {INSTEAD}"
            ) from error
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._workers:
            self._workers.pop().end()

    def run(self, take: Callable[[], Key | None], done: Callable[[Key, Outcome], None]) -> None:
        """Run trials until `take` has none left and all have ended.

        Args:
            take: The next trial.
            done: Called in this process with each outcome as it comes.

        Raises:
            InvalidArgumentError: A process did not start.
        """
        more = True
        while True:
            for worker in self._idle():
                worker.key = take() if more else None
                if worker.key is None:
                    more = False
                    break
                worker.send(json.dumps(worker.key).encode())
            busy = [w for w in self._workers if w.key is not None]
            if more:  # fewer processes than are wanted, or some that are not ready yet
                self._fill()
                busy = [w for w in self._workers if w.key is not None or not w.ready]
            if not busy:
                return
            ready = set(wait([end for w in busy for end in (w.calls, w.process.sentinel)]))
            for worker in busy:
                if ready & {worker.calls, worker.process.sentinel}:
                    self._answer(worker, done)

    def _idle(self) -> list[_Worker]:
        """Processes without a trial; those that died meanwhile are given up."""
        idle = [w for w in self._workers if w.ready and w.key is None]
        for worker in idle:
            if not worker.process.is_alive():
                self._workers.remove(worker)
                worker.end()
        return [w for w in idle if w in self._workers]

    def _fill(self) -> None:
        """Start the processes that are missing, all at once, then hand each the function."""
        while len(self._workers) < self._count:
            self._workers.append(_Worker(self._payload))
        for worker in self._workers:
            if worker.payload is not None:
                worker.send(worker.payload)
                worker.payload = None

    def _answer(self, worker: _Worker, done: Callable[[Key, Outcome], None]) -> None:
        answer = worker.receive()
        if not worker.ready:
            if answer == b"":
                worker.ready = True
                return
            self._workers.remove(worker)
            why = worker.died() if answer is None else answer.decode()
            worker.end()
            raise InvalidArgumentError(
                f"workers={self._count}: a process could not take what it is to run ({why}). "
                'In a script, put the call under `if __name__ == "__main__":`, since every process imports the script. '
                + INSTEAD
            )
        key, worker.key = worker.key, None
        assert key is not None
        if answer is not None:
            done(key, Outcome(**json.loads(answer)))
            return
        self._workers.remove(worker)
        done(key, Outcome(reason=f"the process that ran it died ({worker.died()})", lost=True))
