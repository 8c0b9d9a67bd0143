"""`homeport serve`: the daemon; and the options that make a configuration, which other commands take as well."""

from __future__ import annotations

import logging
import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from broker.commands.failed import CommandFailed
from broker.commands.page import Page, add
from broker.config import Config, ConfigError, load
from broker.supervisor import tell

if TYPE_CHECKING:
    import argparse

    from broker.commands.page import Commands

STATE_FILES = (
    ("STATE/kv/", "the disk tier and the stored responses"),
    ("STATE/secret", "what tenants' names and cache salts are made of; without it their caches are lost"),
    ("STATE/models/", "converted models"),
    ("STATE/homeport.lock", "held by the one process that uses the directory"),
)  # fmt: skip
_SERVE = Page(
    "run the daemon",
    """\
Serve OpenAI Responses (WebSocket and HTTP), Chat Completions and Anthropic
Messages on one port, with each session's KV cache kept on the device, in RAM
and on disk. Without --config the defaults of config/default.toml hold.

One line goes to stdout when requests are accepted: "homeport ready URL". Logs
go to stderr: a line a turn, without prompts, texts or keys. The first start
converts the default model (about a minute).

SIGTERM or SIGINT lets running turns end for server.grace, writes what is not
on disk yet, and leaves with 0. A second one ends at once.""",
    (
        ("the default model, for this machine only", "homeport serve"),
        ("with the file that `homeport init` wrote", "homeport serve --config homeport.toml"),
        ("another model", "homeport serve --set model.path=Qwen/Qwen3-0.6B --set model.name=qwen3-0.6b"),
        ("a file, an overlay over it, and one key over both",
         "homeport serve --config large-gpu.toml --config team.toml --set tiers.host.capacity=64GiB"),
    ),
    files=(("STATE", "server.state_dir, by default ~/.local/share/homeport"), *STATE_FILES),
    environment=(
        ("NOTIFY_SOCKET", "set by systemd for Type=notify units: where readiness is told"),
        ("HF_HOME, HF_TOKEN", "read by the hub's library, for models that are named by a hub id"),
        ("CUDA_VISIBLE_DEVICES", "read by CUDA: which GPUs there are"),
    ),
)  # fmt: skip


def add_commands(commands: Commands) -> None:
    parser = add(commands, "serve", _SERVE)
    add_config(parser)
    parser.add_argument("--host", metavar="H", help="address to listen on (server.host)")
    parser.add_argument(
        "--port", type=int, metavar="N", help="port to listen on; 0 picks one (server.port)"
    )
    parser.set_defaults(run=_serve)


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="TOML; may be given again, later files win key by key",
    )
    parser.add_argument(
        "--state-dir", type=Path, metavar="DIR", help="where everything is kept (server.state_dir)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="assignments",
        metavar="key.path=value",
        help="one key, over every file; may be given again",
    )


def config_of(arguments: argparse.Namespace) -> Config:
    """The files, then --set, then the options that have names of their own. Raises ConfigError."""
    config = load(arguments.config, arguments.assignments)
    server = config.server
    if arguments.state_dir is not None:
        server = replace(server, state_dir=arguments.state_dir.expanduser())
    if getattr(arguments, "host", None) is not None:
        server = replace(server, host=arguments.host)
    if getattr(arguments, "port", None) is not None:
        if not 0 <= arguments.port <= 65535:
            raise ConfigError(f"--port must be between 0 and 65535, not {arguments.port}")
        server = replace(server, port=arguments.port)
    return replace(config, server=server)


def _serve(arguments: argparse.Namespace) -> int:
    import trio

    from broker.access import check_exposure
    from broker.app import StartError, open_model_engine, serve

    config = config_of(arguments)
    check_exposure(config)
    logging.basicConfig(
        stream=sys.stderr,
        level=config.log.level.upper(),
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
    )
    logging.getLogger("trio-websocket").setLevel(
        logging.INFO
    )  # its debug lines hold what clients say

    # A core dump would hold every prompt in memory.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    from engine.model import UnsupportedModel
    from tiers.block import StoreError
    from tiers.state_dir import StateDirRefused

    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # ends a start at once; `serve` takes over when it can end well
    reasons: list[str] = []
    try:
        trio.run(lambda: serve(config, open_engine=open_model_engine, announce=_announce))
    except* (ConfigError, StartError, UnsupportedModel, StoreError, StateDirRefused) as group:
        reasons = [str(error) for error in _leaves(group)]
    if reasons:
        raise CommandFailed("; ".join(reasons))
    return 0


def _announce(line: str) -> None:
    print(line, flush=True)
    tell("READY=1")


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    out: list[BaseException] = []
    for error in group.exceptions:
        out += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return out
