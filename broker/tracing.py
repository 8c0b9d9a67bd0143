"""Turns as OpenTelemetry spans, on the semantic conventions for generative AI. The only file that knows either.

    chat MODEL              one per turn, a child of the span that the request's `traceparent` names
      parse queue render    one per stay in a stage of `broker/breakdown.py`, without a gap
      restore prefill …

Laws
    A turn is exported once, when it is over; until then it costs nothing here.
    Nothing that was said is in a span: the conventions' content attributes are left out.
    Whoever started the trace decides whether it is sampled. A turn without a trace starts one, and is.
    The collector is told off the event loop. One that does not listen costs spans, never turns.

The conventions are in development: names may change, and then this file does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from broker.breakdown import Stage, Status

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.util.types import AttributeValue

    from broker.breakdown import TraceContext, TurnRecord

_API_TYPES = {"responses": "responses", "chat": "chat_completions"}
_FINISH_REASONS = {None: "stop", "max_output_tokens": "length"}
_EXPORT_S = 1.5  # for a batch, tries included: less than a shutdown waits for the last one


class Tracing:
    """`processor` takes the spans that are over."""

    def __init__(self, processor: SpanProcessor) -> None:
        self._provider = TracerProvider(
            sampler=ParentBased(ALWAYS_ON),
            resource=Resource({"service.name": "homeport"}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("homeport")

    @classmethod
    def to(cls, endpoint: str) -> Tracing:
        """OTLP over HTTP, in batches, from a thread of the library's."""
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_S)))

    def export(self, turn: TurnRecord) -> None:
        began = turn.ended_at - turn.total_s
        span = self._tracer.start_span(
            f"chat {turn.model or ''}".rstrip(),
            context=_parent(turn.origin.trace),
            kind=SpanKind.SERVER,
            attributes=_attributes(turn),
            start_time=_ns(began),
        )
        if turn.status is Status.FAILED:
            span.set_status(StatusCode.ERROR, turn.reason)
        inside = set_span_in_context(span)
        for lap in turn.laps:
            stage = self._tracer.start_span(
                lap.stage.value,
                context=inside,
                attributes=_restored(turn) if lap.stage is Stage.RESTORE else None,
                start_time=_ns(began + lap.begin),
            )
            stage.end(_ns(began + lap.end))
        span.end(_ns(turn.ended_at))

    def close(self) -> None:
        """Send what is left, if somebody takes it soon. May wait: not for the event loop."""
        self._provider.force_flush()
        self._provider.shutdown()


def _attributes(turn: TurnRecord) -> dict[str, AttributeValue]:
    origin, tokens = turn.origin, turn.tokens
    attributes: dict[str, AttributeValue | None] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "homeport",
        "gen_ai.request.model": turn.model,
        "gen_ai.response.model": turn.model,
        "gen_ai.response.id": turn.response_id,
        "gen_ai.conversation.id": turn.session,
        "gen_ai.usage.input_tokens": turn.prompt_tokens,
        "gen_ai.usage.output_tokens": turn.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": turn.prompt_tokens - tokens["computed"],
        "gen_ai.response.time_to_first_chunk": turn.first_token_s,
        "openai.api.type": _API_TYPES.get(origin.dialect),
        "homeport.request.id": origin.request_id,
        "homeport.dialect": origin.dialect,
        "homeport.transport": origin.transport,
        "homeport.status": turn.status.value,
        **{f"homeport.tokens.{source}": count for source, count in tokens.items()},
        **{f"homeport.recomputed.{why}": count for why, count in turn.recomputed.items()},
    }
    if turn.status in (Status.COMPLETED, Status.INCOMPLETE):
        reason = _FINISH_REASONS.get(turn.reason, turn.reason or "")
        attributes["gen_ai.response.finish_reasons"] = [reason]
    elif turn.status in (Status.FAILED, Status.REFUSED):
        attributes["error.type"] = turn.reason or "_OTHER"
    return {name: value for name, value in attributes.items() if value is not None}


def _restored(turn: TurnRecord) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {}
    for tier, seconds in turn.restore_s.items():
        attributes[f"homeport.restore.{tier}.seconds"] = seconds
        attributes[f"homeport.restore.{tier}.tokens"] = turn.tokens[tier]
    return attributes


def _parent(trace: TraceContext | None) -> Context | None:
    if trace is None:
        return None
    flags = TraceFlags(TraceFlags.SAMPLED if trace.sampled else TraceFlags.DEFAULT)
    caller = SpanContext(
        int(trace.trace_id, 16), int(trace.span_id, 16), is_remote=True, trace_flags=flags
    )
    return set_span_in_context(NonRecordingSpan(caller))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
