"""`homeport bench`: measurements, each with a file of its own under broker/bench."""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.bench import agent, events, policy, serve, tiers
from broker.commands.page import Page, add

if TYPE_CHECKING:
    from broker.commands.page import Commands

_BENCH = Page(
    "measure",
    "Measure this machine, this daemon, or another server beside it.",
    (("an agent's loop, interrupted in every way", "homeport bench agent"),),
)
_AGENT = Page(
    "an agent's loop, interrupted in every way we promise to survive",
    """\
Run one agent's conversation, interrupt it in every way that Homeport promises
to survive (a broken socket, idling, a restart, kill -9), and print what each
way of coming back costs beside a cold start. Outputs are compared: they must
be the same. About ten minutes on two cores.""",
    (
        ("daemons of its own", "homeport bench agent"),
        ("short, and as JSON", "homeport bench agent --turns 6 --repeat 1 --json result.json"),
        ("a daemon of yours; it demotes all its sessions",
         "homeport bench agent --url http://127.0.0.1:8321"),
    ),
    status=((1, "an output differed, or a daemon would not start"),),
)  # fmt: skip
_POLICY = Page(
    "what each order of victims costs on a trace, beside Belady's",
    """\
Replay a day of agents, generated or recorded, through the real tables of the
cache, with each order of victims, and print how many tokens are computed for
each new one, beside an order that knows the future. No model is loaded.""",
    (
        ("generated days", "homeport bench policy --seeds 2"),
        ("a trace of yours", "homeport bench policy --trace trace.jsonl --svg curves.svg"),
    ),
)
_TIERS = Page(
    "blocks between tiers, beside what memory and disk can do",
    """\
Spill and restore blocks between device, RAM and disk, and print the rates
beside memcpy and the disk's own. What is written is removed again.""",
    (
        ("the disk of the state directory", "homeport bench tiers"),
        ("another disk", "homeport bench tiers --dir /mnt/nvme --readers 8"),
    ),
)
_EVENTS = Page(
    "from a sampled token to its event's bytes on the socket",
    """\
Measure how long a token takes from the sampler to the socket, with many
streams at once, over each transport.""",
    (("sixteen streams", "homeport bench events --streams 16 --tokens 100"),),
)
_SERVE = Page(
    "the same sessions against another server, by turns, as ratios",
    """\
Run the same sessions against Homeport and any OpenAI-compatible server, by
turns on the same machine, and print ratios. An other server that is started
here is also restarted.""",
    (
        ("one that runs", "homeport bench serve --quick --against http://127.0.0.1:8080"),
        ("llama.cpp, started here",
         "homeport bench serve --slot-files --against-command"
         " 'llama-server -m MODEL.gguf -c 8192 -np 1 --port {port} --slot-save-path DIR'"),
    ),
)  # fmt: skip
_BENCHES = (
    ("agent", _AGENT, agent),
    ("policy", _POLICY, policy),
    ("tiers", _TIERS, tiers),
    ("events", _EVENTS, events),
    ("serve", _SERVE, serve),
)


def add_commands(commands: Commands) -> None:
    bench = add(commands, "bench", _BENCH)
    benches = bench.add_subparsers(required=True, metavar="BENCHMARK")
    for name, page, module in _BENCHES:
        parser = add(benches, name, page)
        module.add_arguments(parser)
        parser.set_defaults(run=module.main)
