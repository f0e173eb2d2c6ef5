"""A headless Chromium, driven over a pipe by the DevTools protocol: https://chromedevtools.github.io/devtools-protocol."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONGEST = 60.0  # seconds for anything: a browser that hangs must not hang the tests
COMMANDS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def command() -> str | None:
    """Where it is installed."""
    return next((found for name in COMMANDS if (found := shutil.which(name))), None)


class Browser:
    """One browser with one page. `dialogs`, `requests` and `errors` collect what the page did since it was opened."""

    def __init__(self, profile: Path) -> None:
        path = command()
        assert path is not None
        theirs_in, self._write = (_high(fd) for fd in os.pipe())
        self._read, theirs_out = (_high(fd) for fd in os.pipe())
        null = os.open(os.devnull, os.O_RDWR)
        self._pid = os.posix_spawn(
            path,
            [path, "--headless=new", "--no-sandbox", "--remote-debugging-pipe", f"--user-data-dir={profile}",
             "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run",
             "--disable-extensions", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND"],
            os.environ | {"HOME": str(profile)},
            file_actions=[
                *((os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)),
                (os.POSIX_SPAWN_DUP2, theirs_in, 3),
                (os.POSIX_SPAWN_DUP2, theirs_out, 4),
            ],
            setsid=True,
        )  # fmt: skip
        for fd in (theirs_in, theirs_out, null):
            os.close(fd)
        self._buffer = b""
        self._next = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """Send a command and wait for its answer."""
        self._next += 1
        message = {"id": self._next, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda m: m.get("id") == message["id"])
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def open(
        self, path: Path, *, width: int = 1200, height: int = 900, dark: bool = False, script: bool = True
    ) -> None:
        """Open a file and wait until it is loaded; without `script` nothing in it runs."""
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        if not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._until(lambda m: m.get("method") == "Page.loadEventFired")
        if not script:
            return
        # Two frames later everything that the page does by itself has begun.
        self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def value(self, expression: str) -> Any:
        """What an expression in the page comes to."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def point(self, x: float, y: float) -> None:
        """Move the mouse."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        """Press a key that has a name."""
        codes = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39, "Escape": 27}
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def close(self) -> None:
        """End it, and whatever it started."""
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._read)
        os.close(self._write)

    @property
    def dialogs(self) -> list[str]:
        return [e["params"]["message"] for e in self._named("Page.javascriptDialogOpening")]

    @property
    def requests(self) -> list[str]:
        """Addresses that were asked for, but the page itself."""
        asked = self._named("Network.requestWillBeSent")
        return [e["params"]["request"]["url"] for e in asked if e["params"].get("type") != "Document"] + [
            e["params"]["request"]["url"] for e in asked if e["params"].get("type") == "Document"
        ][1:]

    @property
    def blocked(self) -> int:
        """How many of them the page's policy held back, so that they never left the browser."""
        return sum(e["params"].get("blockedReason") == "csp" for e in self._named("Network.loadingFailed"))

    @property
    def errors(self) -> list[str]:
        """What stands in the console: of the page's own, and what the browser says of it."""
        thrown = [str(e["params"]["exceptionDetails"]) for e in self._named("Runtime.exceptionThrown")]
        said = [str(e["params"]["args"]) for e in self._named("Runtime.consoleAPICalled")]
        return thrown + said + [e["params"]["entry"]["text"] for e in self._named("Log.entryAdded")]

    def _named(self, method: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["method"] == method]

    def _until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + LONGEST
        while True:
            message = self._message(deadline)
            if "method" in message:
                self.events.append(message)
            if message.get("method") == "Page.javascriptDialogOpening":  # else everything waits for an answer
                self._next += 1
                answer = {"id": self._next, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
                os.write(self._write, json.dumps(answer | {"sessionId": self._session}).encode() + b"\0")
            if wanted(message):
                return message

    def _message(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            piece = os.read(self._read, 1 << 16)
            assert piece, "the browser is gone"
            self._buffer += piece
        first, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        return message


def _high(fd: int) -> int:
    """The same file under a number that is out of the way of those the browser expects."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return moved
