"""Which ids may be continued from where, under any sequence of requests over sockets, lanes and HTTP.

A small model of the documented rules is driven beside the real thing. After each step both must agree on whether the parent
was found, and the engine must have been given exactly the tokens that the chain consists of: an answer to a wrong prompt
would be a wrong answer, because the model's answer depends on every id.

    stored      answers from anywhere, to its tenant, until it is deleted
    unstored    answers on its socket, while it is its lane's latest; a cancelled one keeps the one before it, too
    failed      a continuation that fails takes its own lane's parent along; a fork's failure takes nothing

    replayed    Messages and Chat name nothing: what they repeat leads to the same tokens, whoever heard them first, and
                what they were answered can be continued by its id like any other response
"""

import dataclasses
import itertools
from dataclasses import dataclass, field

import trio
from hypothesis import event, given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from tests.broker.rig import TERMINAL, open_rig
from tests.broker.wire.grammar import check_events
from tests.fakes import END, byte_text, echoing_sum

NOT_FOUND = "previous_response_not_found"
TENANTS = ("a", "b")
LANES = (None, "one", "two")
SOCKETS = 2  # per tenant


@dataclass(frozen=True)
class Ask:
    """One request. `parent` picks among the ids that were ever made, the newest first; None is a fresh start."""

    parent: int | None
    store: bool
    how: str  # completes | fails | refused | cancelled | warms


@dataclass(frozen=True)
class Said:
    """A response that was made: whose it is, and every id of its chain."""

    id: str
    tenant: str
    stored: bool
    tokens: tuple[int, ...]
    talk: tuple[tuple[str, str], ...] = ()  # (user's words, answer) of every turn
    replayable: bool = True  # every turn has words and an answer


@dataclass
class Model:
    """The rules, in the fewest words."""

    made: list[Said] = field(default_factory=list)  # all that can be named, whoever's
    deleted: set[str] = field(default_factory=set)
    lanes: dict = field(default_factory=dict)  # {(tenant, socket): {lane: ids that answer there}}

    def finds(self, tenant, where, said):
        if said.id in self.deleted or said.tenant != tenant:
            return False
        here = itertools.chain.from_iterable(self.lanes.get(where, {}).values())
        return said.stored or said.id in here

    def ended(self, where, lane, said, parent, how):
        """`where` is None for what has no connection."""
        if where is None:
            return
        kept = self.lanes.setdefault(where, {}).get(lane, [])
        match how:
            case "failed":
                kept = [one for one in kept if parent is None or one != parent.id]
            case "cut":
                kept = [*kept[:1], said.id]
            case "done":
                kept = [said.id]
        self.lanes[where][lane] = kept


class Socket:
    """Asks over a lane of a WebSocket."""

    def __init__(self, rig, client, tenant, where):
        self.rig, self.client, self.tenant, self.where = rig, client, tenant, where

    async def ask(self, lane, body, how):
        """Send it. Nothing is read."""
        where = {} if lane is None else {"stream_id": lane}
        more = {"generate": False} if how == "warms" else {}
        if how == "refused":
            more = {"temperature": 9}
        if how == "cancelled":
            self.rig.engine.hold()
        await self.client.send({"type": "response.create", **body, **where, **more})
        if how == "cancelled":  # before the engine has begun: nothing was said
            await wait_all_tasks_blocked()
            await self.client.send({"type": "response.cancel", **where})

    async def answers(self, lanes):
        """The terminal or error event of each lane, from what comes in any order."""
        streams = {lane: [] for lane in lanes}
        ended = {}
        while len(ended) < len(lanes):
            said = await self.client.event()
            lane = said.get("stream_id")
            if said["type"] == "error":
                assert streams[lane] == [], "an error after the response had begun"
                ended[lane] = said
                continue
            streams[lane].append(said)
            if said["type"] in TERMINAL:
                check_events(streams[lane], stream_id=lane)
                ended[lane] = said
        return ended


class Http:
    """Asks over HTTP: one lane, no connection."""

    where = None

    def __init__(self, rig, tenant):
        self.rig, self.tenant = rig, tenant
        self.answer = None

    async def ask(self, lane, body, how):
        more = {"temperature": 9} if how == "refused" else {}
        self.answer = await self.rig.browser().request(
            "POST", "/v1/responses", {**body, **more}, authorization=f"Bearer {self.tenant}"
        )

    async def answers(self, lanes):
        (lane,) = lanes
        found = self.answer.json
        if self.answer.status == 500:
            return {lane: {"type": "response.failed", "response": None}}
        if self.answer.status != 200:
            return {lane: {"type": "error", **found}}
        return {lane: {"type": f"response.{found['status']}", "response": found}}


class Replay:
    """Asks over an API without ids, by repeating everything. `parent` is what it repeats."""

    where = None
    parent = None

    def __init__(self, rig, tenant):
        self.rig, self.tenant = rig, tenant
        self.answer = None

    async def ask(self, lane, body, how):
        talk = () if self.parent is None else self.parent.talk
        messages = []
        for words, answer in talk:
            messages += [
                {"role": "user", "content": words},
                {"role": "assistant", "content": answer},
            ]
        messages.append({"role": "user", "content": body["input"]})
        more = {"temperature": 9} if how == "refused" else {}
        self.answer = await self.rig.browser().request(
            "POST",
            self.path,
            {"model": "smollm2-135m-instruct", "messages": messages, **self.fields(body), **more},
            authorization=f"Bearer {self.tenant}",
        )

    async def answers(self, lanes):
        (lane,) = lanes
        if self.answer.status == 400:  # each API has its own words for it; only one field was wrong
            return {lane: {"type": "error", "error": {"code": "decimal_above_max_value"}}}
        if self.answer.status != 200:
            assert self.answer.status == 500
            return {lane: {"type": "response.failed", "response": None}}
        said, text = self.read(self.answer.json)
        named = "resp_" + said.partition(self.prefix)[2]
        response = {
            "id": named,
            "status": "completed",
            "output": [{"content": [{"text": text}]}],
        }
        return {lane: {"type": "response.completed", "response": response}}


class Messages(Replay):
    path, prefix = "/v1/messages", "msg_"

    def fields(self, body):
        return {"max_tokens": 1000}

    def read(self, message):
        return message["id"], "".join(block["text"] for block in message["content"])


class Chat(Replay):
    path, prefix = "/v1/chat/completions", "chatcmpl-"

    def fields(self, body):
        return {"store": body["store"]}

    def read(self, completion):
        return completion["id"], completion["choices"][0]["message"]["content"]


def after(tokens, text):
    """The prompt that goes on from a chain with a user's words."""
    opened = byte_text().encode(f"<|start|>user\n{text}<|end|>\n<|start|>assistant\n")
    if not tokens or tokens[-1] == ord("\n"):  # nothing, or a warm-up: no turn of the model is open
        return (*tokens, *opened)
    closed = "\n" if tokens[-1] == END else "<|end|>\n"
    return (*tokens, *byte_text().encode(closed), *opened)


class World:
    def __init__(self, rig, nursery):
        self.rig, self.nursery = rig, nursery
        self.model = Model()
        self.sockets = {}
        self.words = itertools.count(1)

    async def socket(self, tenant, number):
        where = (tenant, number)
        if where not in self.sockets:
            client = await self.nursery.start(self._hold, tenant)
            self.sockets[where] = Socket(self.rig, client, tenant, where)
        return self.sockets[where]

    async def _hold(self, tenant, task_status=trio.TASK_STATUS_IGNORED):
        async with self.rig.websocket(authorization=f"Bearer {tenant}") as client:
            client.dropped = trio.Event()
            task_status.started(client)
            await client.dropped.wait()

    async def reconnect(self, tenant, number):
        self.model.lanes.pop((tenant, number), None)
        old = self.sockets.pop((tenant, number), None)
        if old is not None:
            old.client.dropped.set()
            await wait_all_tasks_blocked()

    async def delete(self, tenant, index):
        if not self.model.made:
            return
        said = self.model.made[index % len(self.model.made)]
        answer = await self.rig.browser().request(
            "DELETE", f"/v1/responses/{said.id}", authorization=f"Bearer {tenant}"
        )
        gone = said.stored and said.tenant == tenant and said.id not in self.model.deleted
        assert answer.status == (200 if gone else 404)
        if gone:
            self.model.deleted.add(said.id)

    async def turns(self, dialect, asks):
        """Requests on different lanes, asked one after the other, all of them before any is answered by the engine."""
        engine = self.rig.engine
        plans = {}
        failing = any(ask.how == "fails" for ask in asks.values())
        alone = len(asks) == 1
        if not alone:
            engine.hold()
        for lane, ask in asks.items():
            made = self.model.made
            parent = None if ask.parent is None or not made else made[-1 - ask.parent % len(made)]
            text = f"word {next(self.words)}"
            if isinstance(dialect, Replay):
                parent = parent if parent is not None and parent.replayable else None
                dialect.parent, found = parent, True
            else:
                found = parent is None or self.model.finds(dialect.tenant, dialect.where, parent)
            plans[lane] = (ask, parent, text, found)
            if ask.how == "refused" or not found:  # that ends it before the next is asked
                self.model.ended(dialect.where, lane, None, parent, "failed")
        engine.faults.fail_after = 2 if failing else None
        before = len(engine.submitted)
        for lane, (ask, parent, text, _) in plans.items():
            body = {"input": text, "store": ask.store}
            if parent is not None and not isinstance(dialect, Replay):
                body["previous_response_id"] = parent.id
            await dialect.ask(lane, body, ask.how)
            await wait_all_tasks_blocked()
        engine.go()
        ended = await dialect.answers(list(plans))
        await wait_all_tasks_blocked()  # warm-ups land
        engine.faults.fail_after = None
        prompts = {submit.prompt for submit in engine.submitted[before:]}
        for lane, plan in plans.items():
            self._check(dialect, lane, plan, ended[lane], prompts)

    def _check(self, dialect, lane, plan, last, prompts):
        ask, parent, text, found = plan
        event(f"{type(dialect).__name__} {ask.how} {last['type']} {'found' if found else 'lost'}")
        if last["type"] == "error":
            expected = "decimal_above_max_value" if ask.how == "refused" else NOT_FOUND
            assert last["error"]["code"] == expected
            assert ask.how == "refused" or not found
            return
        assert found, "an id was continued that may not be"
        assert ask.how != "refused"
        prompt = after(() if parent is None else parent.tokens, text)
        bare = prompt[: -len(byte_text().encode("<|start|>assistant\n"))]  # no turn of the model
        if ask.how == "warms":
            prompt = bare
        assert prompt in prompts, "not the tokens of the chain"
        if last["type"] == "response.failed":
            self.model.ended(dialect.where, lane, None, parent, "failed")
            return
        response = last["response"]
        spoken = "".join(
            part["text"] for item in response["output"] for part in item.get("content", ())
        )
        sampled = tuple(spoken.encode())
        if response["status"] == "completed" and ask.how != "warms":
            sampled = (*sampled, END)
            assert sampled == echoing_sum(prompt)
        chain = prompt + sampled if sampled else bare
        talk = () if parent is None else parent.talk
        said = Said(
            response["id"],
            dialect.tenant,
            ask.store and not isinstance(dialect, Messages),
            chain,
            (*talk, (text, spoken)),
            replayable=bool(spoken) and (parent is None or parent.replayable),
        )
        self.model.made.append(said)
        cut = response["status"] == "incomplete"
        self.model.ended(dialect.where, lane, said, parent, "cut" if cut else "done")


ASK = st.builds(
    Ask,
    parent=st.sampled_from([None, 0, 0, 1, 1, 1, 2, 3, 5, 9]),
    store=st.sampled_from([False, False, True]),
    how=st.sampled_from(
        ["completes"] * 4 + ["fails", "refused", "cancelled", "cancelled", "warms"]
    ),
)
TENANT = st.sampled_from(TENANTS[:1] * 3 + TENANTS[1:])
NUMBER = st.sampled_from([0, 0, 0, *range(SOCKETS)])
LANE = st.sampled_from([None, None, None, *LANES])
STEPS = st.lists(
    st.one_of(
        *[st.tuples(st.just("lane"), TENANT, NUMBER, LANE, ASK)] * 6,
        st.tuples(
            st.just("lanes"),
            TENANT,
            NUMBER,
            st.dictionaries(st.sampled_from(LANES), ASK, min_size=2),
        ),
        st.tuples(st.just("http"), TENANT, ASK),
        *[st.tuples(st.sampled_from([Messages, Chat]), TENANT, ASK)] * 2,
        st.tuples(st.just("reconnect"), TENANT, NUMBER),
        st.tuples(st.just("delete"), TENANT, st.integers(0, 30)),
    ),
    min_size=8,
    max_size=24,
)


@given(STEPS)
async def test_ids_are_worth_what_the_rules_say(steps):
    async with open_rig("auth.keys=['a', 'b']", reply=echoing_sum) as rig:
        async with trio.open_nursery() as nursery:
            world = World(rig, nursery)
            with trio.fail_after(60):
                for step in steps:
                    match step:
                        case ("lane", tenant, number, lane, ask):
                            await world.turns(await world.socket(tenant, number), {lane: ask})
                        case ("lanes", tenant, number, asks):
                            # A warm-up ends at once, and what fails, fails all that run with it.
                            calm = {
                                lane: dataclasses.replace(ask, how="completes")
                                if ask.how in ("fails", "cancelled", "warms")
                                else ask
                                for lane, ask in asks.items()
                            }
                            await world.turns(await world.socket(tenant, number), calm)
                        case ("http", tenant, ask):
                            if ask.how in ("cancelled", "warms"):
                                ask = dataclasses.replace(ask, how="completes")
                            await world.turns(Http(rig, tenant), {None: ask})
                        case (api, tenant, Ask() as ask):
                            if ask.how in ("cancelled", "warms"):
                                ask = dataclasses.replace(ask, how="completes")
                            await world.turns(api(rig, tenant), {None: ask})
                        case ("reconnect", tenant, number):
                            await world.reconnect(tenant, number)
                        case ("delete", tenant, index):
                            await world.delete(tenant, index)
            nursery.cancel_scope.cancel()
