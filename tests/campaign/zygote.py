"""A process that has imported everything and has opened nothing: each daemon is a fork of it, up in hundredths of a second.

A daemon made so is a process like any other: its own pid, its own lock, its own map of LMDB, killed by SIGKILL. Only
the imports are shared, which would otherwise be nine tenths of a campaign's time.

The zygote is asked over a pipe, one JSON line each way:

    {"fork": [arguments], "log": PATH}  ->  {"pid": PID}
    {"ready": PID, "within": SECONDS}   ->  {"line": its first line on stdout, "" if it ended or was too slow}
    {"reap": PID}                       ->  {"status": exit status, negative for a signal; null if it still runs}
    {"wait": PID}                       ->  {"status": as above, once it has ended}

When the pipe closes, it kills what still runs and ends.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from broker.bench.daemon import READY, DidNotStart

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType


class Zygote:
    """The asking side."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it has imported everything

    def ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def __enter__(self) -> Zygote:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class StubDaemon:
    """One stub daemon after the other on one state directory; the methods are `broker.bench.daemon.Daemon`'s."""

    def __init__(
        self,
        zygote: Zygote,
        state_dir: Path,
        settings: Sequence[str],
        *,
        options: Sequence[str] = (),
    ) -> None:
        state_dir.parent.mkdir(parents=True, exist_ok=True)
        self.state_dir = state_dir
        self.log = state_dir.with_name(state_dir.name + ".log")
        self.options = tuple(options)  # of stub_daemon, such as --fail-call
        self.url = ""
        self._settings = tuple(settings)
        self._zygote = zygote
        self._pid: int | None = None

    @property
    def pid(self) -> int:
        assert self._pid is not None, "not running"
        return self._pid

    def spawn(self) -> None:
        """Begin to start; `ready` waits for it."""
        assert self._pid is None, "already running"
        arguments = ["--state-dir", str(self.state_dir), *self.options]
        for setting in self._settings:
            arguments += ["--set", setting]
        self._pid = self._zygote.ask(fork=arguments, log=str(self.log))["pid"]

    def ready(self, within_s: float) -> None:
        """Raises DidNotStart."""
        line = self._zygote.ask(ready=self._pid, within=within_s)["line"]
        if not line.startswith(READY):
            raise DidNotStart(
                f"no ready line within {within_s} s but {line!r}; the log ends:\n{self.tail()}"
            )
        self.url = line.removeprefix(READY).strip()

    def start(self, within_s: float = 30.0) -> float:
        """Seconds that it took. Raises DidNotStart."""
        began = time.perf_counter()
        self.spawn()
        self.ready(within_s)
        return time.perf_counter() - began

    def kill(self) -> int:
        """SIGKILL; -9, or what it had ended with before by itself."""
        return self._end(signal.SIGKILL)

    def terminate(self) -> int:
        return self._end(signal.SIGTERM)

    def ended(self) -> int | None:
        """The exit status of a daemon that ended by itself; None while it runs."""
        status = self._zygote.ask(reap=self._pid)["status"]
        if status is not None:
            self._pid = None
        return None if status is None else int(status)

    def end(self) -> None:
        """Kill it if it still runs."""
        if self._pid is not None:
            self.kill()

    def tail(self, lines: int = 40) -> str:
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _end(self, how: signal.Signals) -> int:
        if (status := self.ended()) is not None:
            return status
        assert self._pid is not None
        os.kill(self._pid, how)  # not reaped yet, so the pid is still its own
        status = int(self._zygote.ask(wait=self._pid)["status"])
        self._pid = None
        return status

    def __enter__(self) -> StubDaemon:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()


# -- the process itself ----------------------------------------------------------------------------------------------


def _serve() -> None:
    import gc

    import broker.app  # noqa: F401 -- imported for the forks
    import tests.campaign.failing
    import tests.campaign.stub_daemon  # noqa: F401

    gc.freeze()
    os.write(1, b"ready\n")
    children: dict[int, int] = {}  # {pid: where its stdout is read}
    for line in iter(sys.stdin.buffer.readline, b""):
        match json.loads(line):
            case {"fork": arguments, "log": log}:
                pid, out = _fork(arguments, log, children)
                children[pid] = out
                answer: dict[str, object] = {"pid": pid}
            case {"ready": pid, "within": seconds}:
                answer = {"line": _first_line(children[pid], seconds)}
            case {"reap": pid}:
                answer = {"status": _status(pid, os.WNOHANG, children)}
            case {"wait": pid}:
                answer = {"status": _status(pid, 0, children)}
            case unknown:
                raise AssertionError(unknown)
        os.write(1, json.dumps(answer).encode() + b"\n")
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _fork(arguments: list[str], log: str, children: dict[int, int]) -> tuple[int, int]:
    out, into = os.pipe()
    if (pid := os.fork()) != 0:
        os.close(into)
        return pid, out
    status = 1
    try:
        for other in (out, *children.values()):
            os.close(other)
        written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (into, 1), (written, 2)):
            os.dup2(source, target)
            os.close(source)
        status = sys.modules["tests.campaign.stub_daemon"].main(arguments)
    finally:
        sys.excepthook(*sys.exc_info()) if sys.exc_info()[0] else None
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _first_line(out: int, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    line = b""
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([out], [], [], max(0.0, deadline - time.monotonic()))
        read = os.read(out, 4096) if readable else b""
        if not read:
            return ""
        line += read
    return line.decode()


def _status(pid: int, options: int, children: dict[int, int]) -> int | None:
    found, status = os.waitpid(pid, options)
    if not found:
        return None
    os.close(children.pop(pid))
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    _serve()
