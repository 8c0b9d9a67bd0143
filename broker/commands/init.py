"""`homeport init`: look at this machine, measure its disk, and write the configuration that fits it.

Laws
    A file that is there is not touched without --force: that is asked before anything is measured, and once more, by
    the kernel, when the new file gets its name.
    The file has its name only once it loads as the daemon would load it.
    Keys are printed once, after the file is there, and are written nowhere.
"""

from __future__ import annotations

import os
import secrets
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from broker.commands.failed import CommandFailed
from broker.commands.page import Page, add
from broker.config import Config, ConfigError, Server, digest_as_written, load

if TYPE_CHECKING:
    import argparse

    from broker.commands.page import Commands
    from broker.disk_rate import Rates
    from broker.first_config import Found
    from engine.device import Devices

_MEASURED_BYTES = 256 << 20
_MEASURED_S = 3.0  # in each direction
_INIT = Page(
    "write a configuration that fits this machine",
    """\
Look at this machine (cores, memory and what a control group allows of it, GPU,
the state directory's disk, which is written and read for a few seconds), and
write a commented configuration: tiers with their arithmetic, and two new keys.

The keys are printed once; the file holds their digests. The client key is for
agents and SDKs, the operator key for `homeport top`, /metrics and /admin.

A file that is there is never overwritten without --force, which also means new
keys. The state directory is created, for its owner alone.""",
    (
        ("./homeport.toml, for the default model", "homeport init"),
        ("another model, and where everything is kept",
         "homeport init --model Qwen/Qwen3-0.6B --state-dir /srv/homeport"),
        ("once more, after the model was downloaded", "homeport init --force --model Qwen/Qwen3-0.6B"),
    ),
    status=((1, "the file exists, or cannot be written; the disk cannot be used"),),
    files=(
        ("homeport.toml", "what is written, mode 0600; another one with --config"),
        ("STATE", "the state directory; 256 MiB of it are used while measuring"),
    ),
    environment=(("CUDA_VISIBLE_DEVICES", "read by CUDA: which GPUs there are"),),
)  # fmt: skip


def add_commands(commands: Commands) -> None:
    parser = add(commands, "init", _INIT)
    parser.add_argument(
        "--config",
        type=Path,
        default=Path("homeport.toml"),
        metavar="FILE",
        help="what to write (default: %(default)s)",
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        default=Server().state_dir,
        metavar="DIR",
        help="where the daemon will keep everything (default: %(default)s)",
    )
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="a transformers directory, a GGUF or a hub id; without it the embedded model",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace the file if it is there, and its keys"
    )
    parser.set_defaults(run=_init)


def _init(arguments: argparse.Namespace) -> int:
    from broker.first_config import Chosen, config_text, remarks

    target: Path = arguments.config.expanduser()
    if not arguments.force and os.path.lexists(target):
        raise CommandFailed(_exists(target))
    state_dir = arguments.state_dir.expanduser().absolute()
    found = _look(state_dir, arguments.model)
    key, operator_key = f"hp-{secrets.token_hex(32)}", f"hp-operator-{secrets.token_hex(32)}"
    chosen = Chosen(
        state_dir=state_dir,
        model_path=arguments.model,
        key=digest_as_written(key),
        operator_key=digest_as_written(operator_key),
        version=version("homeport"),
        day=_today(),
    )
    write(target, config_text(found, chosen), replace=arguments.force)
    for remark in remarks(found):
        print(f"homeport: warning: {remark}", file=sys.stderr)
    print(f"{target}: written\n")
    print(f"client key    {key}")
    print(f"operator key  {operator_key}")
    print("Shown this once: the file holds their digests.\n")
    print(f"what it will hold   homeport config check {target}")
    print(f"what is wrong here  homeport doctor --config {target}")
    print(f"start               homeport serve --config {target}")
    return 0


def write(target: Path, text: str, *, replace: bool) -> None:
    """The whole file or none, and only one that loads. Raises CommandFailed."""
    from broker.access import check_exposure

    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(fd)
            check_exposure(load([beside]))
            if replace:
                beside.replace(target)
            else:
                target.hardlink_to(beside)
        finally:
            beside.unlink(missing_ok=True)
    except FileExistsError as error:
        raise CommandFailed(_exists(target)) from error
    except OSError as error:
        raise CommandFailed(f"{target}: cannot be written: {error.strerror}") from error
    except ConfigError as error:
        raise CommandFailed(f"this machine and these options make no good file: {error}") from error


def _exists(target: Path) -> str:
    return f"{target}: exists; --force replaces it, and its keys"


def _look(state_dir: Path, model: str | None) -> Found:
    from dataclasses import replace

    from broker import machine
    from broker.first_config import Found
    from broker.forecast import Shape, read_shape, read_weights

    _prepare(state_dir)
    devices = _devices()
    base = Config()
    config = replace(
        base,
        server=replace(base.server, state_dir=state_dir),
        model=replace(base.model, path=model),
    )
    dtype = "float32" if devices.gpu is None else "bfloat16"
    return Found(
        cores=machine.cores(),
        memory=machine.memory(),
        open_files=machine.open_files(),
        devices=devices,
        file_system=machine.file_system(state_dir),
        rates=_rates(state_dir, machine.file_system(state_dir).free_bytes),
        shape=read_shape(config) or (Shape() if model is None else None),
        weights_bytes=read_weights(config, dtype),
    )


def _prepare(state_dir: Path) -> None:
    """As the daemon will. Raises CommandFailed."""
    from tiers.state_dir import StateDirRefused, make_private

    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        make_private(state_dir)
    except (OSError, StateDirRefused) as error:
        raise CommandFailed(f"{error}; choose another --state-dir") from error


def _devices() -> Devices:
    """With a word to who waits: torch takes seconds."""
    print("looking for a GPU (torch takes a moment to load)", file=sys.stderr)
    from engine.device import look

    return look()


def _rates(state_dir: Path, free_bytes: int) -> Rates | None:
    """None where there is too little room to measure. Raises CommandFailed."""
    from tqdm import tqdm

    from broker.disk_rate import REQUEST_BYTES, measure

    size = min(_MEASURED_BYTES, free_bytes // 10 // REQUEST_BYTES * REQUEST_BYTES)
    if not size:
        return None
    with tqdm(
        total=2 * size, unit="B", unit_scale=True, desc="measuring the disk", file=sys.stderr
    ) as bar:
        try:
            return measure(state_dir, size, _MEASURED_S, bar.update)
        except OSError as error:
            raise CommandFailed(
                f"{state_dir}: cannot be written and read: {error.strerror}; choose another --state-dir"
            ) from error


def _today() -> str:
    from datetime import date

    from broker.app import SystemClock

    return date.fromtimestamp(SystemClock().now()).isoformat()
