"""What the doctor looks at: records without judgement. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from broker.config import Config
    from broker.forecast import Machine, Shape
    from broker.machine import FileSystem, Memory, OpenFiles
    from engine.device import Devices


@dataclass(frozen=True, slots=True)
class Requirement:
    """What homeport needs of another distribution, and what is installed."""

    name: str
    wanted: str  # such as ">=2.11,<2.14"
    installed: str | None
    fits: bool


@dataclass(frozen=True, slots=True)
class Installation:
    homeport: str
    python: str
    requirements: tuple[Requirement, ...]
    devices: Devices | None  # None: torch cannot be loaded
    architecture: str  # as uname says
    cpu_flags: frozenset[str]
    cores: int


@dataclass(frozen=True, slots=True)
class PathFacts:
    """A file or directory that must be ours alone."""

    path: Path
    exists: bool
    symlink: bool = False
    owned: bool = True  # by the user that asks
    mode: int = 0o700
    writable: bool = True  # where it does not exist: whether it could be made
    size: int = 0


@dataclass(frozen=True, slots=True)
class State:
    """The state directory."""

    directory: PathFacts
    secret: PathFacts
    file_system: FileSystem
    newest_age_s: float | None  # of what was written last; negative: in the future
    holder: str | None  # pid of the process that has it open
    left_by: str | None  # pid in a lock that nobody holds
    store: str | None  # clean, unclean or unsynced; None: there is none, or somebody has it open
    put_aside: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Certificate:
    problem: str | None  # why it cannot be used
    days_left: float | None = None
    key_readable_by_others: bool = False


@dataclass(frozen=True, slots=True)
class Setup:
    """A configuration on this machine."""

    sources: str
    config: Config | None
    problem: str | None  # why there is none
    exposure: str | None = None  # what `serve` would refuse of it
    listening: str | None = None  # why its address cannot be listened on
    shape: Shape | None = None
    machine: Machine | None = None
    weights_bytes: int | None = None
    state: State | None = None
    certificate: Certificate | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    memory: Memory
    open_files: OpenFiles
    year: int  # of the wall clock


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: object  # JSON, or text


@dataclass(frozen=True, slots=True)
class Daemon:
    """A daemon, asked. Answers are by path; one that is not there was not asked."""

    url: str
    loopback: bool  # it was asked over this machine, or over its own socket
    expected: bool  # a process holds the state directory, or the operator named the URL
    unreachable: str | None = None
    answers: dict[str, Answer] | None = None
    keyless: int | None = None  # the status of a request without a key; None: the door is the key
    keyed: bool = False  # a key was given
    clock_ahead_s: float | None = None  # its Date header against our clock
    certificate: Certificate | None = None
    version: str | None = None
    metrics: dict[str, float] | None = None  # {name with labels: value}


@dataclass(frozen=True, slots=True)
class Facts:
    installation: Installation
    limits: Limits
    setup: Setup | None  # None: only a daemon was asked about
    daemon: Daemon | None
