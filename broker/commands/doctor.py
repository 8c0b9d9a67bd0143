"""`homeport doctor`: what is wrong, and what to do, one line a finding."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from broker.commands.page import Page, add
from broker.commands.serving import STATE_FILES, add_config, config_of

if TYPE_CHECKING:
    import argparse

    from broker.commands.page import Commands
    from broker.doctor.rules import Finding

_DOCTOR = Page(
    "say what is wrong with a machine, a configuration or a daemon, and what to do",
    """\
Look at what is installed, the CPU and GPU, memory, open files, the clock, the
configuration, the state directory (permissions, lock, file system, room, how
the store was left), the port, TLS, and the daemon that runs, if one does: one
line a finding, which for what is not good also says what to do (->). Nothing is
changed, and no daemon is disturbed.

With a URL only that daemon is asked, and what this command runs on is looked
at. A key is sent over loopback, a Unix socket or verified TLS only.

  ok       looked at, and good
  note     worth knowing, nothing to do
  WARNING  works, and something will go wrong, be slow or be less safe
  BROKEN   does not start, loses something, leaks something, does not answer""",
    (
        ("before the first start", "homeport doctor --config homeport.toml"),
        ("a running daemon, with what only operators see",
         "homeport doctor --config homeport.toml --key hp-operator-KEY"),
        ("another machine's", "homeport doctor https://llm.example.org --key hp-KEY"),
        ("for a program", "homeport doctor --json"),
    ),
    status=((0, "nothing is wrong; notes count as nothing"), (1, "warnings"), (2, "something is broken")),
    files=STATE_FILES,
    environment=(("CUDA_VISIBLE_DEVICES", "read by CUDA: which GPUs there are"),),
)  # fmt: skip


def add_commands(commands: Commands) -> None:
    parser = add(commands, "doctor", _DOCTOR)
    parser.add_argument(
        "url", nargs="?", metavar="URL", help="a daemon: http://HOST:PORT, https://… or unix:PATH"
    )
    add_config(parser)
    parser.add_argument("--key", metavar="KEY", help="a bearer key; an operator's shows most")
    parser.add_argument("--json", action="store_true", help="findings for a program")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from broker.app import SystemClock
    from broker.doctor import look
    from broker.doctor.facts import Facts
    from broker.doctor.rules import diagnose, exit_status

    now = SystemClock().now()
    print("looking (torch takes a moment to load)", file=sys.stderr)
    setup, daemon = None, None
    if arguments.url is not None:
        daemon = look.look_at_daemon(arguments.url, arguments.key, now, expected=True)
    else:
        sources = ", ".join(str(one) for one in arguments.config) or "the defaults"
        setup = look.look_at_setup(sources, lambda: config_of(arguments), now)
        url = None if setup.config is None else look.url_of(setup.config)
        if url is not None and setup.state is not None:
            held = setup.state.holder is not None
            daemon = look.look_at_daemon(
                url, arguments.key, now, expected=held, config=setup.config
            )
    installation = look.look_at_installation()
    findings = diagnose(Facts(installation, look.look_at_limits(now), setup, daemon))
    status = exit_status(findings)
    if arguments.json:
        said = [_as_json(finding) for finding in findings]
        print(
            json.dumps({"status": ("ok", "warning", "broken")[status], "findings": said}, indent=2)
        )
    else:
        print("\n".join(_line(finding) for finding in findings))
    return status


def _as_json(finding: Finding) -> dict[str, str | None]:
    return {
        "level": finding.level.value,
        "check": finding.check,
        "says": finding.says,
        "todo": finding.todo,
    }


def _line(finding: Finding) -> str:
    from broker.doctor.rules import Level

    loud = finding.level in (Level.WARNING, Level.BROKEN)
    level = finding.level.value.upper() if loud else finding.level.value
    todo = f" -> {finding.todo}" if finding.todo else ""
    return f"{level:<8} {finding.check:<14} {finding.says}{todo}"
