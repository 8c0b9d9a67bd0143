"""Spans as the SDK's own exporter collects them: a turn, its stages without a gap, and the caller's trace."""

import builtins
import threading

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from broker.app import StartError, open_tracing
from broker.breakdown import Breakdown, Origin, Stage, Status, TraceContext
from broker.config import load
from broker.observations import Observations
from broker.tracing import Tracing
from engine.api import CachedTokens, Usage
from tests.broker.rig import open_rig

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
NOW = 1_000_000_000.0


@pytest.fixture
def exported():
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exported):
    tracing = Tracing(SimpleSpanProcessor(exported))
    yield tracing
    tracing.close()


def turn(trace=None, status=Status.COMPLETED, reason=None):
    breakdown = Breakdown(Origin("req_1", "chat", "http", trace), 100.0)
    breakdown.response_id, breakdown.session, breakdown.model = "resp_1", "mine", "m"
    breakdown.status, breakdown.reason = status, reason
    breakdown.enter(Stage.QUEUE, 101.0)
    breakdown.enter(Stage.RENDER, 102.0)
    breakdown.submitted(103.0)
    breakdown.sampled(1, 107.0)
    cached = CachedTokens(device=1, host=2, disk=3)
    usage = Usage(
        10, cached, 4, 5, 1.0, 1.0, 2.0, 3.0, {"host": 0.25, "disk": 0.75}, {"new": 3, "logits": 1}
    )
    breakdown.ran(usage, 110.0)
    return breakdown.record(110.5, NOW)


def test_a_turn_is_a_span_with_its_stages_inside(tracing, exported):
    tracing.export(turn())
    *stages, whole = exported.get_finished_spans()
    assert (whole.name, whole.kind) == ("chat m", SpanKind.SERVER)
    assert whole.end_time - whole.start_time == pytest.approx(10.5e9)
    assert whole.end_time == NOW * 1e9
    names = ["parse", "queue", "render", "queue", "restore", "prefill", "decode", "send"]
    assert [span.name for span in stages] == names
    assert {span.parent.span_id for span in stages} == {whole.context.span_id}
    edges = [whole.start_time, *(span.end_time for span in stages)]
    assert [span.start_time for span in stages] == edges[:-1]
    assert edges[-1] == pytest.approx(whole.end_time)
    (restore,) = [span for span in stages if span.name == "restore"]
    assert dict(restore.attributes) == {
        "homeport.restore.host.seconds": 0.25,
        "homeport.restore.host.tokens": 2,
        "homeport.restore.disk.seconds": 0.75,
        "homeport.restore.disk.tokens": 3,
    }


def test_its_attributes_are_the_conventions_and_nothing_that_was_said(tracing, exported):
    tracing.export(turn())
    attributes = dict(exported.get_finished_spans()[-1].attributes)
    assert attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "homeport",
        "gen_ai.request.model": "m",
        "gen_ai.response.model": "m",
        "gen_ai.response.id": "resp_1",
        "gen_ai.conversation.id": "mine",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": 7.0,
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 6,
        "openai.api.type": "chat_completions",
        "homeport.request.id": "req_1",
        "homeport.dialect": "chat",
        "homeport.transport": "http",
        "homeport.status": "completed",
        "homeport.tokens.computed": 4,
        "homeport.tokens.device": 1,
        "homeport.tokens.host": 2,
        "homeport.tokens.disk": 3,
        "homeport.tokens.remote": 0,
        "homeport.recomputed.new": 3,
        "homeport.recomputed.logits": 1,
    }


@pytest.mark.parametrize(
    ("status", "reason", "code", "shown"),
    [
        (Status.INCOMPLETE, "max_output_tokens", StatusCode.UNSET, ("length",)),
        (Status.INCOMPLETE, "steered", StatusCode.UNSET, ("steered",)),
        (Status.FAILED, "server_error", StatusCode.ERROR, "server_error"),
        (Status.REFUSED, "model_not_found", StatusCode.UNSET, "model_not_found"),
        (Status.ABANDONED, None, StatusCode.UNSET, None),
    ],
)
def test_how_a_turn_ended_is_the_span_s_status(tracing, exported, status, reason, code, shown):
    tracing.export(turn(status=status, reason=reason))
    span = exported.get_finished_spans()[-1]
    assert span.status.status_code is code
    attributes = span.attributes
    said = attributes.get("error.type", attributes.get("gen_ai.response.finish_reasons"))
    assert said == shown


def test_the_caller_s_trace_goes_on(tracing, exported):
    tracing.export(turn(TraceContext(TRACE_ID, SPAN_ID, sampled=True)))
    spans = exported.get_finished_spans()
    assert {f"{span.context.trace_id:032x}" for span in spans} == {TRACE_ID}
    assert f"{spans[-1].parent.span_id:016x}" == SPAN_ID


def test_a_trace_that_its_caller_does_not_sample_is_not_exported(tracing, exported):
    tracing.export(turn(TraceContext(TRACE_ID, SPAN_ID, sampled=False)))
    assert exported.get_finished_spans() == ()


async def test_a_request_s_traceparent_arrives(tracing, exported):
    async with open_rig() as rig:
        rig.port.observations = Observations((tracing.export,))
        header = f"00-{TRACE_ID}-{SPAN_ID}-01"
        body = {"input": "Hi."}
        answer = await rig.browser().request("POST", "/v1/responses", body, traceparent=header)
        (whole,) = [s for s in exported.get_finished_spans() if s.kind is SpanKind.SERVER]
        assert f"{whole.parent.span_id:016x}" == SPAN_ID
        assert whole.attributes["gen_ai.response.id"] == answer.json["id"]
        assert whole.attributes["gen_ai.request.model"] == rig.config.model.name


async def test_without_the_extra_it_is_off_and_asking_for_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith(("opentelemetry", "broker.tracing")):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    async with open_tracing(load().tracing) as exporters:
        assert exporters == ()
    with pytest.raises(StartError, match=r"homeport\[otel\]"):
        async with open_tracing(load([], ["tracing.enabled=true"]).tracing):
            pass


async def test_a_collector_that_is_not_there_costs_no_turn():
    sets = ["tracing.enabled=true", 'tracing.endpoint="http://127.0.0.1:9/v1/traces"']
    before = threading.active_count()
    async with open_tracing(load([], sets).tracing) as (export,):
        export(turn())
    assert threading.active_count() <= before + 1, "trio's own; the exporter has given up"
