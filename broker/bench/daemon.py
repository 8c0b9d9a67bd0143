"""A daemon of our own as a subprocess: started on a free port, asked politely to stop, or killed.

Laws
    The state directory outlives the process: `start` after `terminate` or `kill` is a restart on the same state.
    Whoever made a `Daemon` ends it; leaving the `with` block kills what still runs.
    Blocking throughout: a trio caller goes through `trio.to_thread`.
"""

from __future__ import annotations

import select
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

READY = "homeport ready "
START_TIMEOUT_S = 300.0  # the first start converts the model
STOP_TIMEOUT_S = 60.0  # a shutdown writes what is dirty


class DidNotStart(Exception):
    """The daemon ended, or said nothing, before it was ready. Carries the end of its log."""


class Daemon:
    """`homeport serve --port 0` on `state_dir`; its log is `<state_dir>.log`, appended to by restarts."""

    def __init__(
        self,
        state_dir: Path,
        *,
        settings: Sequence[str] = (),
        models: Path | None = None,
        program: Sequence[str] = (sys.executable, "-m", "broker"),
    ) -> None:
        """`settings` are `key.path=value`; `models` is a folder of converted models to share; `program` is `homeport`."""
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if models is not None and not (state_dir / "models").exists():
            models.mkdir(parents=True, exist_ok=True)
            (state_dir / "models").symlink_to(models.resolve(), target_is_directory=True)
        self.state_dir = state_dir
        self.log = state_dir.with_name(state_dir.name + ".log")
        self._settings = tuple(settings)
        self._program = tuple(program)
        self._process: subprocess.Popen[bytes] | None = None
        self._url = ""

    @property
    def url(self) -> str:
        """`http://HOST:PORT` of the running process; a restart changes it."""
        assert self._process is not None, "not running"
        return self._url

    @property
    def pid(self) -> int:
        assert self._process is not None, "not running"
        return self._process.pid

    def start(self) -> float:
        """Start and wait for the ready line; seconds that took. Raises `DidNotStart`."""
        assert self._process is None, "already running"
        command = [*self._program, "serve", "--port", "0"]
        command += ["--state-dir", str(self.state_dir)]
        for setting in self._settings:
            command += ["--set", setting]
        began = time.perf_counter()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        try:
            self._url = self._ready_line(began + START_TIMEOUT_S)
        except DidNotStart:
            self.kill()
            raise
        return time.perf_counter() - began

    def _ready_line(self, deadline: float) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        readable, _, _ = select.select(
            [self._process.stdout], [], [], max(0.0, deadline - time.perf_counter())
        )
        line = self._process.stdout.readline().decode() if readable else ""
        if not line.startswith(READY):
            raise DidNotStart(f"no ready line but {line!r}; the log ends:\n{self.tail()}")
        return line.removeprefix(READY).strip()

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def terminate(self) -> int:
        """SIGTERM, then wait for the end; the exit status. Raises TimeoutExpired."""
        return self._end(signal.SIGTERM)

    def kill(self) -> int:
        """SIGKILL: nothing is flushed, nothing is said."""
        return self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> int:
        assert self._process is not None, "not running"
        process = self._process
        process.send_signal(how)
        status = process.wait(STOP_TIMEOUT_S)
        if process.stdout is not None:
            process.stdout.close()
        self._process = None
        return status

    def __enter__(self) -> Daemon:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self.kill()
