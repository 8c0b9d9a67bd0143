"""Anthropic Messages: a turn in that API's words, the count of a prompt's tokens, and the probes of its clients.

Laws
    One table of cache entries for all tenants, as old as the app: after a restart nothing is claimed to have been read.
    A prompt is counted as a turn would render it, with every sampled id that is known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from broker.errors import BadRequest
from broker.foresight import session_labels
from broker.recall import Recall
from broker.routes.body import begun, read_body, request_id_of, tenant_of, understood
from broker.routes.turns import TurnResponse
from broker.session import ConnectionScope
from broker.turn import conversation
from broker.wire.cache_control import PromptCaches
from broker.wire.json_in import parse_object
from broker.wire.messages_in import parse_count, parse_messages
from broker.wire.messages_out import MessageStream, diagnostics
from broker.wire.sse import sse_frame
from engine.text import UnrenderableError
from tiers.policy import SessionClass

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from starlette.requests import Request

    from broker.access import Tenant
    from broker.port import Port
    from broker.session import Part
    from broker.wire.cache_control import InputUsage
    from broker.wire.messages_in import MessagesRequest
    from broker.wire.requests import TurnRequest
    from broker.wire.responses_out import Event
    from tiers.block import TokenIds

PROBE_PATHS = ("/", "/api/hello")  # asked before anything else, often without a key


def messages_routes(port: Port) -> list[Route]:
    routes = _Messages(port)
    return [
        Route("/v1/messages", routes.create, methods=["POST"]),
        Route("/v1/messages/count_tokens", routes.count_tokens, methods=["POST"]),
        *(Route(path, hello, methods=["GET"]) for path in PROBE_PATHS),  # and HEAD
    ]


@dataclass(frozen=True, slots=True)
class MessagesAnswer:
    """The turn's words as Anthropic's. Without a stream the machine hears everything too: it must know the prompt."""

    streams: bool
    machine: MessageStream

    def frames(self, event: Event) -> Iterable[bytes]:
        said = self.machine.feed(event)
        return [sse_frame(one) for one in said] if self.streams else ()

    def end(self) -> bytes:
        return b""

    def whole(self, response: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.machine.message(response)


class _Messages:
    def __init__(self, port: Port) -> None:
        self._port = port
        self._caches = PromptCaches(min_tokens=port.config.messages.cache_min_tokens)

    async def create(self, request: Request) -> TurnResponse:
        tenant, labels = tenant_of(request), session_labels(request.scope["headers"])
        if _begins_anew(request.headers):
            await self._close(tenant, labels)
        else:
            await self._port.expect(tenant, labels)
        body = await read_body(request, self._port)
        breakdown = begun(request, self._port, "messages")
        self._port.check_room(tenant, breakdown)
        asked = await understood(body, _parsed)
        if not labels and asked.user_id is not None:
            labels = (asked.user_id,)
        answer = MessagesAnswer(asked.turn.stream, self._machine(request, tenant, asked))
        scope = ConnectionScope(labels=labels)
        turn = replace(asked.turn, wire_bytes=len(body))
        return TurnResponse(turn, answer, tenant, scope, self._port, breakdown)

    async def _close(self, tenant: Tenant, labels: tuple[str, ...]) -> None:
        """The session's turns so far are not gone on from: their KV goes before that of those which wait."""
        node = await Recall(self._port.engine, self._port.sessions, tenant).latest(labels)
        if node is not None and node.lease is not None:
            self._port.engine.reclass(node.lease, SessionClass.CLOSED)
            node.expected_at = self._port.clock.now()  # so that the turn does not fetch it either

    def _machine(self, request: Request, tenant: Tenant, asked: MessagesRequest) -> MessageStream:
        started_at = self._port.clock.now()

        def account(prompt: Mapping[str, Any]) -> InputUsage:
            return self._caches.begun(
                tenant.name,
                asked.layout,
                prompt_tokens=prompt["input_tokens"],
                cached_tokens=prompt["cached_tokens"],
                ends=prompt["cuts"],
                started_at=started_at,
            )

        def diagnose(cache: Mapping[str, Any]) -> dict[str, Any] | None:
            if asked.turn.follows is None:
                return None
            before = self._port.sessions.known(tenant.name, asked.turn.follows)
            return diagnostics(None if before is None else before.sampled_from, cache)

        return MessageStream(
            thinking=asked.thinking,
            account=account,
            diagnose=diagnose if asked.diagnosed else None,
            request_id=request_id_of(request.scope),
        )

    async def count_tokens(self, request: Request) -> Response:
        turn = await understood(await read_body(request, self._port), _counted)
        self._port.check_model(turn.model)
        tokens = await self._prompt(tenant_of(request), turn)
        return JSONResponse({"input_tokens": len(tokens)})

    async def _prompt(self, tenant: Tenant, turn: TurnRequest) -> TokenIds:
        def prompt(parts: tuple[Part, ...]) -> TokenIds:
            whole = conversation(turn.instructions, turn.tools, parts)
            return self._port.engine.text.prompt(whole)

        try:
            recall = Recall(self._port.engine, self._port.sessions, tenant)
            said = await recall.parts(turn.items, prompt=prompt)
            return prompt(said.parts)
        except UnrenderableError as error:
            raise BadRequest(str(error), code="invalid_prompt", param="messages") from error


async def hello(request: Request) -> Response:
    """Somebody is there."""
    return JSONResponse({"status": "ok"})


def _parsed(body: bytes) -> MessagesRequest:
    return parse_messages(parse_object(body))


def _counted(body: bytes) -> TurnRequest:
    return parse_count(parse_object(body))


def _begins_anew(headers: Mapping[str, str]) -> bool:
    """Whether the agent says that it compacted its context. A helper agent says so of its own, under the same session."""
    said = headers.get("x-claude-code-context-compacted", "").lower()
    main = headers.get("x-claude-code-request-class", "main") == "main"
    return main and said not in ("", "0", "false")
