"""A whole engine without a model: a byte tokenizer and a service with the same methods as `engine.service`.

A constraint is compiled by the real library, for bytes, and a real matcher checks what the "model" says: an answer that
it does not allow fails the test, and one that it holds complete ends there.

The "model" is a function of *all* ids, so an answer to the wrong prompt is a wrong answer. Usage is measured against
what was really fed before, by tenant salt. Every fault that the broker must survive has a switch.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import trio

from engine.api import (
    Began,
    CachedTokens,
    DiskReport,
    EngineReport,
    Finished,
    FinishReason,
    LeaseId,
    Likelihood,
    Located,
    PinReport,
    Refused,
    RefuseReason,
    RequestId,
    Sampled,
    Usage,
)
from engine.grammar import Grammars, Matcher
from engine.text import Text
from tiers.block import StoreError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from engine.api import Output, Sampling, Submit
    from tiers.block import Tier, TokenIds
    from tiers.manifest import Manifest
    from tiers.policy import SessionClass

START, END = 256, 257  # the byte tokenizer's control tokens
_CONTROL = {START: "<|start|>", END: "<|end|>"}
_CONTROL_IDS = {text: i for i, text in _CONTROL.items()}


@dataclass(frozen=True, slots=True)
class ByteSpecial:
    content: str
    special: bool = True


class ByteTokenizer:
    """Ids 0..255 are bytes, 256 and 257 control tokens. Its template is ChatML's shape and knows no tools."""

    eos_token_id = END
    added_tokens_decoder: ClassVar = {i: ByteSpecial(text) for i, text in _CONTROL.items()}

    def get_chat_template(
        self, chat_template: str | None = None, tools: list[Any] | None = None
    ) -> str:
        return "see apply_chat_template"

    def apply_chat_template(
        self,
        conversation: list[Any],
        *,
        tools: list[Any] | None,
        tokenize: bool,
        add_generation_prompt: bool,
        enable_thinking: bool | None = None,  # nothing to this template
    ) -> str:
        assert not tokenize
        if not conversation:
            raise ValueError("an empty conversation")  # as transformers has it
        text = "".join(f"<|start|>{m['role']}\n{m['content']}<|end|>\n" for m in conversation)
        return text + "<|start|>assistant\n" if add_generation_prompt else text

    def encode(
        self, text: str, *, add_special_tokens: bool, split_special_tokens: bool
    ) -> list[int]:
        assert not add_special_tokens
        if split_special_tokens:
            return list(text.encode())
        ids: list[int] = []
        for part in re.split(r"(<\|start\|>|<\|end\|>)", text):
            ids += [_CONTROL_IDS[part]] if part in _CONTROL_IDS else part.encode()
        return ids

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        out = bytearray()
        for token in token_ids:
            if token < START:
                out.append(token)
            elif not skip_special_tokens:
                out += _CONTROL[token].encode()
        return out.decode(errors="replace")


def byte_text() -> Text:
    return Text(ByteTokenizer())


def byte_grammars() -> Grammars:
    tokens = [bytes([byte]) for byte in range(START)]
    tokens += [text.encode() for text in _CONTROL.values()]
    return Grammars.of_tokens(tokens, special=sorted(_CONTROL), stop_ids=[END])


def saying(*texts: str) -> Callable[[TokenIds], TokenIds]:
    """A model that says these texts, one per turn, each ended by END; the last one again and again."""
    answers = itertools.chain(texts, itertools.repeat(texts[-1]))
    return lambda _prompt: (*next(answers).encode(), END)


def echoing_sum(prompt: TokenIds) -> TokenIds:
    """A model whose whole answer depends on every id of the prompt and on their order."""
    state, out = 1, []
    for token in prompt:
        state = (state * 31 + token + 1) % 1_000_003
    for _ in range(8):
        state = (state * 1_103 + 12_345) % 1_000_003
        out.append(ord("a") + state % 26)
    return (*out, END)


@dataclass(slots=True)
class Faults:
    """What goes wrong, from now on."""

    refuse: RefuseReason | None = None
    late: bool = False  # refusals wait for `go`
    fail_after: int | None = None  # sampled ids until Finished(FAILED)
    persist: bool = False  # StoreError from persist
    pin: bool = False  # over the quota


@dataclass(slots=True)
class FakeService:
    """EngineService's methods over dictionaries. Construct it inside a nursery's task: `FakeService(nursery)`.

    `reply` is the model: the prompt's ids to the sampled ids, stop id included. `hold()` stops all generations
    before their next id until `go()`.
    """

    nursery: trio.Nursery
    reply: Callable[[TokenIds], TokenIds] = echoing_sum
    text: Text = field(default_factory=byte_text)
    model_name: str = "fake"
    max_context: int = 4096
    chunk: int = 1  # ids per Sampled
    faults: Faults = field(default_factory=Faults)
    tier: str = "device"  # where cached tokens are found
    # what happened
    submitted: list[Submit] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    cancelled: list[RequestId] = field(default_factory=list)
    leases: dict[LeaseId, SessionClass | None] = field(
        default_factory=dict
    )  # None: never reclassed
    manifests: list[Manifest] = field(default_factory=list)  # oldest first
    durable: list[str] = field(default_factory=list)  # response ids whose writing was awaited
    fed: list[tuple[bytes, TokenIds]] = field(default_factory=list)  # (salt, ids) whose KV is there
    prefetched: list[TokenIds] = field(default_factory=list)
    demoted: list[tuple[Tier, str | None]] = field(default_factory=list)
    demoted_salts: list[bytes | None] = field(default_factory=list)  # of the same
    pinned: dict[tuple[bytes, str], float] = field(
        default_factory=dict
    )  # {(salt, session): seconds}
    forgotten: list[tuple[str, str]] = field(default_factory=list)  # (tenant, response id)
    disk: DiskReport = field(default_factory=lambda: DiskReport(state="ok"))
    logprob: float = -0.5  # of every id, where logprobs are asked for
    _requests: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _running: dict[RequestId, trio.CancelScope] = field(default_factory=dict)
    _gate: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        self._gate.set()

    def hold(self) -> None:
        self._gate = trio.Event()

    def go(self) -> None:
        self._gate.set()

    def new_request(self) -> RequestId:
        return RequestId(next(self._requests))

    @asynccontextmanager
    async def generate(
        self, submit: Submit, ended: Callable[[], None] = lambda: None
    ) -> AsyncIterator[trio.MemoryReceiveChannel[Output]]:
        matcher = None
        if submit.sampling.constraint is not None:
            await trio.lowlevel.checkpoint()
            matcher = Matcher(byte_grammars().compile(submit.sampling.constraint))
        send, receive = trio.open_memory_channel[Any](submit.sampling.max_tokens + 4)
        self.submitted.append(submit)
        self._running[submit.request] = trio.CancelScope()
        self.nursery.start_soon(self._run, submit, send, matcher, ended)
        try:
            yield receive
        finally:
            self.cancel(submit.request)
            receive.close()

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < START else _CONTROL[token].encode()

    def cancel(self, request: RequestId) -> None:
        if request in self._running:
            self._running[request].cancel()

    async def _run(
        self,
        submit: Submit,
        send: trio.MemorySendChannel[Output],
        matcher: Matcher | None,
        ended: Callable[[], None],
    ) -> None:
        request, sampling, prompt = submit.request, submit.sampling, submit.prompt
        with send:
            if self.faults.late:
                await self._gate.wait()
            if (refusal := self._refusal(submit)) is not None:
                del self._running[request]
                send.send_nowait(refusal)
                ended()
                return
            cached = self._cached(submit)
            said: list[int] = []
            reason = FinishReason.STOP
            began = False
            with self._running[request] as scope:
                await self._gate.wait()
                began = True
                _offer(send, Began(request, cached))
                answer = self.reply(prompt)[: sampling.max_tokens] if sampling.max_tokens else ()
                answer = answer if matcher is None else _allowed(answer, matcher)
                for at in range(0, len(answer), self.chunk):
                    await trio.lowlevel.checkpoint()
                    await self._gate.wait()
                    if self.faults.fail_after is not None and at >= self.faults.fail_after:
                        reason = FinishReason.FAILED
                        break
                    tokens = answer[at : at + self.chunk]
                    said += tokens
                    _offer(send, Sampled(request, tokens, self._likelihoods(tokens, sampling)))
                else:
                    stopped = bool(said) and said[-1] in sampling.stop_ids
                    stopped = stopped or (matcher is not None and matcher.complete)
                    reason = FinishReason.STOP if stopped else FinishReason.LENGTH
            if scope.cancelled_caught:
                reason = FinishReason.CANCELLED
                self.cancelled.append(request)
            del self._running[request]
            lease: LeaseId | None = None
            if began:
                lease = LeaseId(int(request) + 1000)
                self.leases.pop(submit.supersedes, None)  # type: ignore[arg-type]
                self.leases[lease] = None
                self.fed.append((submit.salt, prompt + tuple(said)))
            else:
                _offer(send, Began(request, cached))
            computed = len(prompt) - cached.total
            usage = Usage(len(prompt), cached, computed, len(said), recomputed=_reasons(computed))
            self.finished.append(Finished(request, reason, usage, lease, (b"k" * 32,)))
            _offer(send, self.finished[-1])
            ended()

    def _likelihoods(self, tokens: TokenIds, sampling: Sampling) -> tuple[Likelihood, ...]:
        """Alternatives are the ids before it, each twice as unlikely as the last."""
        if sampling.top_logprobs is None:
            return ()
        return tuple(
            Likelihood(
                self.logprob,
                tuple(
                    ((token - n) % 256, self.logprob * 2**n) for n in range(sampling.top_logprobs)
                ),
            )
            for token in tokens
        )

    def _refusal(self, submit: Submit) -> Refused | None:
        if self.faults.refuse is not None:
            return Refused(submit.request, self.faults.refuse, "as asked")
        if len(submit.prompt) > self.max_context:
            return Refused(
                submit.request, RefuseReason.CONTEXT, "the prompt is longer than the context"
            )
        if not submit.prompt:
            return Refused(submit.request, RefuseReason.PROMPT, "empty")
        return None

    def _cached(self, submit: Submit) -> CachedTokens:
        best = 0
        for salt, ids in self.fed:
            if salt == submit.salt:
                same = itertools.takewhile(
                    lambda p: p[0] == p[1], zip(ids, submit.prompt, strict=False)
                )
                best = max(best, sum(1 for _ in same))
        return CachedTokens(**{self.tier: min(best, len(submit.prompt) - 1)})

    def reclass(self, lease: LeaseId, to: SessionClass) -> None:
        if lease in self.leases:
            self.leases[lease] = to

    def prefetch(self, salt: bytes, prompt: TokenIds) -> None:
        self.prefetched.append(prompt)

    async def persist(self, manifest: Manifest) -> None:
        await trio.lowlevel.checkpoint()
        if self.faults.persist:
            raise StoreError("full", "as asked")
        self.manifests.append(manifest)
        self.durable.append(manifest.response_id)

    def persist_later(self, manifest: Manifest) -> None:
        if not self.faults.persist:
            self.manifests.append(manifest)

    async def find_response(self, tenant: str, response_id: str) -> Manifest | None:
        return await self._find(tenant, lambda m: m.response_id == response_id)

    async def find_item(self, tenant: str, item_id: str) -> Manifest | None:
        return await self._find(tenant, lambda m: item_id in m.item_ids)

    async def find_content(self, tenant: str, digest: bytes) -> Manifest | None:
        return await self._find(tenant, lambda m: m.content_digest == digest)

    async def find_session(self, tenant: str, session: str) -> Manifest | None:
        return await self._find(tenant, lambda m: m.session == session)

    async def responses_of(self, tenant: str, session: str) -> list[str]:
        await trio.lowlevel.checkpoint()
        found = [m for m in self.manifests if (m.tenant, m.session) == (tenant, session)]
        return [m.response_id for m in sorted(found, key=lambda m: -len(m.tokens))]

    async def _find(self, tenant: str, wanted: Callable[[Manifest], bool]) -> Manifest | None:
        await trio.lowlevel.checkpoint()
        found = (m for m in reversed(self.manifests) if m.tenant == tenant and wanted(m))
        return next(found, None)

    async def forget_response(self, tenant: str, response_id: str) -> bool:
        await trio.lowlevel.checkpoint()
        self.forgotten.append((tenant, response_id))
        before = len(self.manifests)
        self.manifests = [
            m for m in self.manifests if (m.tenant, m.response_id) != (tenant, response_id)
        ]
        return len(self.manifests) < before

    async def pin(self, salt: bytes, session: str, seconds: float) -> int | None:
        await trio.lowlevel.checkpoint()
        if self.faults.pin or (salt, session) not in {(s.salt, s.session) for s in self.submitted}:
            return None
        self.pinned[salt, session] = seconds
        return 1024

    async def unpin(self, salt: bytes, session: str) -> bool:
        await trio.lowlevel.checkpoint()
        return self.pinned.pop((salt, session), None) is not None

    async def locate(
        self, turns: Iterable[tuple[LeaseId | None, tuple[bytes, ...]]]
    ) -> tuple[Located, ...]:
        await trio.lowlevel.checkpoint()
        on = {"device": 0, "host": 0, "disk": 0, "remote": 0, self.tier: 1}
        return tuple(
            Located(on, "pinned", 7.0, 60.0) if lease in self.leases else Located(on)
            for lease, _ in turns
        )

    async def demote(self, to: Tier, session: str | None, salt: bytes | None = None) -> int:
        await trio.lowlevel.checkpoint()
        self.demoted.append((to, session))
        self.demoted_salts.append(salt)
        return len(self.leases)

    async def inspect(self, *, sessions: bool = True) -> EngineReport:
        await trio.lowlevel.checkpoint()
        return EngineReport(
            running=len(self._running),
            waiting=0,
            loading=0,
            leases=len(self.leases),
            refs=0,
            dirty=0,
            tokens_total={"computed": sum(f.usage.computed_tokens for f in self.finished)},
            output_tokens_total=sum(f.usage.output_tokens for f in self.finished),
            evictions_total={},
            spills_total=0,
            spill_failures_total=0,
            fetches_total=0,
            verify_failures_total={},
            tiers=(),
            sessions=(),
            recomputed_total=dict(
                sum((Counter(f.usage.recomputed) for f in self.finished), Counter())
            ),
            disk=self.disk,
            canary={"checked": 0, "mismatched": 0},
            pins=tuple(
                PinReport(session, 1024, seconds) for (_, session), seconds in self.pinned.items()
            ),
        )


def _allowed(answer: TokenIds, matcher: Matcher) -> TokenIds:
    """The answer up to where its grammar is complete."""
    for at, token in enumerate(answer):
        if matcher.complete:
            return answer[:at]
        assert matcher.accept(token), f"the grammar forbids {bytes(answer[:-1])!r}: {matcher.fault}"
    return answer


def _reasons(computed: int) -> dict[str, int]:
    """The last token of a prompt is computed for its logits; all others of a fake prompt are new."""
    return {reason: n for reason, n in (("new", computed - 1), ("logits", 1)) if n}


def _offer(send: trio.MemorySendChannel[Output], output: Output) -> None:
    """Hand over an output, or not, if the caller left."""
    try:
        send.send_nowait(output)
    except trio.BrokenResourceError:
        return
