"""The other side: any OpenAI-compatible server, one that runs or one that is started here by a command.

Laws
    A command is a program and its arguments, no shell line; `{port}` in it becomes a free port. It runs in a process
    group of its own, and whoever made the `Peer` ends it with `stop`; what does not end by SIGTERM is killed.
    It is ready when `/health` says so, or, where there is none, when it lists its models.
    Servers differ in what they accept: the fullest form of a request is tried first, then poorer ones, once, before
    anything is measured. `dialect` says which it was.
    Slot files are llama.cpp's way to keep a session over a restart; they are saved and loaded by hand, slot 0 alone.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shlex
import signal
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from broker.bench.chat import complete
from broker.bench.client import Refused, call
from broker.bench.conversation import COUNTED, body, opening
from broker.bench.daemon import DidNotStart
from broker.bench.machine import peak_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from broker.bench.chat import Completion
    from broker.bench.conversation import Conversation

START_TIMEOUT_S = 600.0  # some compile at their start
STOP_TIMEOUT_S = 30.0
_POLL_S = 0.1
_SLOT_FILE = "homeport-bench.bin"

DIALECTS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("ignore_eos", {**COUNTED, "ignore_eos": True}),
    ("plain", COUNTED),
    ("plain, uncounted", {}),
)


class Peer:
    def __init__(
        self,
        log: Path,
        *,
        url: str | None = None,
        command: str | None = None,
        name: str | None = None,
        model: str | None = None,
        key: str | None = None,
        slot_files: bool = False,
    ) -> None:
        """`model` is what requests name; without it the first one that the server lists."""
        words = shlex.split(command) if command else []
        self.name = name or (Path(words[0]).name if words else "peer")
        self.slot_files = slot_files
        self.dialect = DIALECTS[0][0]
        self._more = DIALECTS[0][1]
        self._url = url
        self._words = words
        self._model = model
        self._key = key
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._running_url = url or ""
        self._peak = 0

    @property
    def owned(self) -> bool:
        return bool(self._words)

    async def start(self) -> None:
        """Start it if it is ours, and find out how to talk to it. Raises `DidNotStart`, `Refused` or OSError."""
        if self.owned:
            self._spawn()
        await self._ready()
        if self._model is None:
            self._model = await self._first_model()
        await self._settle_on_a_dialect()

    async def ask(self, conversation: Conversation, output_tokens: int) -> Completion:
        request = body(conversation, output_tokens, self._model, self._more)
        return await trio.to_thread.run_sync(
            complete, self._running_url, request, self._key, abandon_on_cancel=True
        )

    async def settle(self) -> None:
        """Nothing that we could ask about."""

    async def restart(self) -> float:
        await self.stop()
        began = trio.current_time()
        self._spawn()
        await self._ready()
        return trio.current_time() - began

    async def save(self) -> None:
        await self._slot("save")

    async def load(self) -> float:
        """The seconds that it took."""
        began = trio.current_time()
        await self._slot("restore")
        return trio.current_time() - began

    async def peak_bytes(self) -> int | None:
        if self._process is not None:
            self._peak = max(self._peak, peak_bytes(self._process.pid))
        return self._peak or None

    async def version(self) -> str:
        told = [self._model or "model not named", f"requests: {self.dialect}"]
        with contextlib.suppress(Refused):
            props = await self._call("GET", "/props")
            told.append(f"build {props['build_info']}, {props['total_slots']} slots")
        with contextlib.suppress(Refused):
            told.append(str((await self._call("GET", "/version"))["version"]))
        return f"{self.name}, {', '.join(told)}"

    async def stop(self) -> None:
        """Nothing, if it is not ours or does not run."""
        if self._process is None:
            return
        if self._process.poll() is None:
            await self.peak_bytes()
            os.killpg(self._process.pid, signal.SIGTERM)
        with trio.CancelScope(shield=True):
            with trio.move_on_after(STOP_TIMEOUT_S):
                while self._process.poll() is None:  # noqa: ASYNC110 -- another process has no event
                    await trio.sleep(_POLL_S)
        with contextlib.suppress(ProcessLookupError):  # all of its group have ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def _spawn(self) -> None:
        port = _free_port()
        self._running_url = self._url or f"http://127.0.0.1:{port}"
        command = [word.replace("{port}", str(port)) for word in self._words]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    async def _ready(self) -> None:
        with trio.move_on_after(START_TIMEOUT_S):
            while not await self._is_ready():
                if self._process is not None and self._process.poll() is not None:
                    raise DidNotStart(f"{self.name} ended; its log ends:\n{self._tail()}")
                if not self.owned:
                    raise DidNotStart(f"nothing is ready at {self._running_url}")
                await trio.sleep(_POLL_S)
            return
        raise DidNotStart(f"{self.name} is not ready; its log ends:\n{self._tail()}")

    async def _is_ready(self) -> bool:
        for path in ("/health", "/v1/models"):
            try:
                await self._call("GET", path)
            except Refused as error:
                if error.status == http.client.NOT_FOUND:
                    continue
                return False
            except OSError:
                return False
            return True
        return False

    async def _first_model(self) -> str | None:
        models = (await self._call("GET", "/v1/models")).get("data") or [{}]
        name: str | None = models[0].get("id")
        return name

    async def _settle_on_a_dialect(self) -> None:
        for self.dialect, self._more in DIALECTS:
            try:
                await self.ask(opening(0, 1), 1)
            except Refused as error:
                if not 400 <= error.status < 500 or self._more == DIALECTS[-1][1]:
                    raise
            else:
                return

    async def _slot(self, action: str) -> None:
        await self._call("POST", f"/slots/0?action={action}", {"filename": _SLOT_FILE})

    async def _call(self, method: str, path: str, request: dict[str, Any] | None = None) -> Any:
        url = self._running_url
        return await trio.to_thread.run_sync(call, method, url, path, request, self._key)

    def _tail(self, lines: int = 20) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
