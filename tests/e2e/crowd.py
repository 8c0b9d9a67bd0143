"""Several agents on one daemon whose device tier holds half of what they say: the same run for the test and, larger,
for the acceptance script."""

from dataclasses import dataclass, field

import trio

from broker.bench.session import Agent, History
from broker.bench.workload import Workload
from tests.broker.wire.grammar import check_events

# The default model's, in float16: layers, K and V, heads, head size, bytes.
TOKEN_BYTES = 30 * 2 * 3 * 64 * 2


@dataclass
class Crowd:
    sessions: int
    turns: int
    sizes: Workload  # its nonce is the first session's
    told: dict[int, list[object]] = field(default_factory=dict)  # {session: what each turn said}
    histories: dict[int, History] = field(default_factory=dict)

    def half(self) -> int:
        """Bytes of half of all sessions' KV."""
        sizes = self.sizes
        session = sizes.system_tokens + self.turns * (sizes.result_tokens + sizes.output_tokens)
        return self.sessions * session * TOKEN_BYTES // 2

    def agent(self, nursery: trio.Nursery, url: str, number: int) -> Agent:
        """Session `number`'s agent; no two share more of a prompt than the template's first words."""
        sizes = self.sizes
        load = Workload(
            sizes.nonce + number, sizes.system_tokens, sizes.result_tokens, sizes.output_tokens
        )
        return Agent(nursery, url, load)

    async def together(self, url: str) -> None:
        """All at once."""
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as agents:
                for number in range(self.sessions):
                    agents.start_soon(self._run, self.agent(nursery, url, number), number)
            nursery.cancel_scope.cancel()

    async def one_by_one(self, url: str, *, every: int = 1) -> None:
        """Each alone; or every second one, for half of the time."""
        async with trio.open_nursery() as nursery:
            for number in range(0, self.sessions, every):
                await self._run(self.agent(nursery, url, number), number)
            nursery.cancel_scope.cancel()

    async def _run(self, agent: Agent, session: int) -> None:
        history, told = History(), []
        for number in range(self.turns):
            history = await agent.next(history, f"turn {number}")
            check_events(list(history.last.events))
            told.append(history.last.said)
        self.told[session], self.histories[session] = told, history

    def differing(self, other: "Crowd") -> list[tuple[int, int]]:
        """(session, turn) of each session's first answer that `other` did not get."""
        first = []
        for session, told in self.told.items():
            turns = [n for n, said in enumerate(told) if said != other.told[session][n]]
            first += [(session, turns[0])] if turns else []
        return first
