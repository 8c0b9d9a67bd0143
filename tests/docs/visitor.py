"""Somebody who reads a page and does what it says: a home, a checkout that is installed, a shell, and one daemon.

Laws
    Blocks are run as they stand. What differs from the reader's machine is the port, the home, and that installing is done.
    Nothing is written outside the visitor's folder: the checkout is links to ours.
    One daemon at a time. It is started by a page's own block, and ended with the visitor.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tests.docs.pages import ROOT

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from tests.docs.pages import Block

LINKED = ("Makefile", "README.md", "CHANGELOG.md", "pyproject.toml", "broker", "config", "docs", "engine", "tests", "tiers")  # fmt: skip
BLOCK_S = 120
START_S = 300
END_S = 60
DIGIT = re.compile(r"\d|…|^-$")


class Visitor:
    def __init__(self, folder: Path, models: Path, engine: str = "model") -> None:
        """`models` is a folder of converted models to share; `engine` as in tests/docs/homeport.py."""
        self.home, self.checkout, self.log = folder / "home", folder / "homeport", folder / "log"
        self.port = _free_port()
        self.output = ""  # of the last shell block
        self.answers: list[Any] = []  # JSON that the daemon said
        self._daemon: subprocess.Popen[str] | None = None
        state = self.home / ".local" / "share" / "homeport"
        state.mkdir(mode=0o700, parents=True)
        models.mkdir(parents=True, exist_ok=True)
        (state / "models").symlink_to(models)
        programs = self.checkout / ".venv" / "bin"
        programs.mkdir(parents=True)
        for name in LINKED:
            (self.checkout / name).symlink_to(ROOT / name)
        python = f"exec '{sys.executable}'"
        for name, run in (
            ("python", python),
            ("homeport", f"{python} -m tests.docs.homeport {self.port} {engine}"),
        ):
            (programs / name).write_text(f'#!/bin/sh\n{run} "$@"\n')
            (programs / name).chmod(0o755)
        for done in (".runtime", ".dev"):  # what the Makefile would install is what runs this
            (self.checkout / ".venv" / done).touch()
        self._environment = {
            "HOME": str(self.home),
            "PATH": f"{programs}:/usr/local/bin:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "LANG": "C.UTF-8",
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def do(self, block: Block) -> None:
        """Run, write or compare one block. Raises AssertionError."""
        match block.kind:
            case "sh" if block.serves:
                self._serve(block)
            case "sh":
                self.output = self._run(block, "bash", "-e")
                with suppress(ValueError):
                    self.answers.append(json.loads(self.output))
            case "python":
                assert self._run(block, sys.executable).strip(), block.place
            case "toml":
                file = self._path(block.rest)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(self._here(block.text))
            case "json":
                self._compare_answer(block)
            case "text" if block.rest == "log":
                fields = [re.findall(r"(\w+)=", line) for line in self.log.read_text().splitlines()]
                assert re.findall(r"(\w+)=", block.text) in fields, block.place
            case "text" if block.rest in ("", "exactly"):
                self._compare_output(block)

    def _here(self, text: str) -> str:
        return text.replace("8321", str(self.port))

    def _path(self, name: str) -> Path:
        inside = name.removeprefix("~/")
        return self.home / inside if inside != name else self.checkout / name

    def _script(self, block: Block) -> Path:
        # A shell reads its script as it goes: one that still serves keeps its own.
        script = self.home / block.place.replace("/", "_").replace(":", "_")
        script.write_text(self._here(block.text))
        return script

    def _run(self, block: Block, *program: str) -> str:
        ran = subprocess.run(
            [*program, str(self._script(block))],
            cwd=self.checkout,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BLOCK_S,
        )
        assert ran.returncode == 0, f"{block.place} ended with {ran.returncode}\n{ran.stderr}"
        return ran.stdout

    def _serve(self, block: Block) -> None:
        """What comes before the daemon's ready line is the block's output."""
        self.end()
        with self.log.open("ab") as log:
            self._daemon = subprocess.Popen(
                ["bash", "-e", str(self._script(block))],
                cwd=self.checkout,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        said, deadline = [""], time.monotonic() + START_S
        assert self._daemon.stdout is not None
        while not said[-1].startswith("homeport ready"):
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._daemon.stdout], [], [], left)
            line = self._daemon.stdout.readline() if ready else ""
            assert line, f"{block.place} serves nothing\n{self.log.read_text()[-4000:]}"
            said.append(line)
        self.output = "".join(said[:-1])

    def end(self) -> None:
        """Stop the daemon, if there is one."""
        if self._daemon is None:
            return
        # Its page may have ended it.
        if self._daemon.poll() is None:
            os.killpg(self._daemon.pid, signal.SIGTERM)
        try:
            self._daemon.communicate(
                timeout=END_S
            )  # until nobody holds its stdout, not the shell alone
        except subprocess.TimeoutExpired:
            os.killpg(self._daemon.pid, signal.SIGKILL)
            raise
        self._daemon = None

    def __enter__(self) -> Visitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def _compare_output(self, block: Block) -> None:
        shape = (lambda line: line) if block.rest == "exactly" else _shape
        printed = [shape(" ".join(line.split())) for line in self.output.splitlines()]
        for line in block.text.splitlines():
            wanted = shape(" ".join(line.split()))
            assert wanted in printed, f"{block.place}: {line!r} is not in\n{self.output}"
            if block.rest == "exactly":
                del printed[: printed.index(wanted) + 1]

    def _compare_answer(self, block: Block) -> None:
        fields = set(
            _fields(json.loads(block.text if block.text[0] == "{" else f"{{{block.text}}}"))
        )
        known = {field for answer in self.answers for field in _fields(answer)}
        assert fields <= known, f"{block.place}: {sorted(fields - known)}"


def _shape(line: str) -> str:
    """A line without its numbers and ids."""
    return " ".join("#" if DIGIT.search(word) else word for word in line.split())


def _fields(value: Any, path: str = "") -> list[str]:
    """The paths of everything that a JSON value holds."""
    match value:
        case dict():
            return [
                one
                for name, inner in value.items()
                for one in (f"{path}.{name}", *_fields(inner, f"{path}.{name}"))
            ]
        case list():
            return [one for inner in value for one in _fields(inner, f"{path}[]")]
    return []


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port
