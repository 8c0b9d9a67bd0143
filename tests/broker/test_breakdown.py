"""A turn's account: it adds up whatever happens, and what it says is fit for a log."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.breakdown import SOURCES, Breakdown, Origin, Stage, Status, TraceContext
from engine.api import CachedTokens, Usage

ORIGIN = Origin("req_1", "responses", "http")
TICKS = st.integers(0, 1000).map(lambda n: n / 1024)  # sums are exact


def usage(queue=0.0, load=0.0, prefill=0.0, decode=0.0, **more):
    return Usage(
        prompt_tokens=10,
        cached=CachedTokens(host=3, disk=4),
        computed_tokens=3,
        output_tokens=2,
        queue_s=queue,
        load_s=load,
        prefill_s=prefill,
        decode_s=decode,
        recomputed={"new": 2, "logits": 1},
        load_by_tier={"host": load / 2, "disk": load / 2} if load else {},
        **more,
    )


def ended(breakdown, now):
    breakdown.status = breakdown.status or Status.COMPLETED
    return breakdown.record(now, 1_000_000.0)


@given(st.data())
def test_the_stages_add_up_to_the_whole_time_whatever_happens(data):
    now = began = data.draw(TICKS)
    breakdown = Breakdown(ORIGIN, now)
    asked = None
    for _ in range(data.draw(st.integers(0, 12))):
        now += data.draw(TICKS)
        match data.draw(st.sampled_from(("enter", "submitted", "sampled", "ran"))):
            case "enter":
                breakdown.enter(data.draw(st.sampled_from(Stage)), now)
            case "submitted":
                breakdown.submitted(now)
                asked = now
            case "sampled":
                breakdown.sampled(data.draw(st.integers(1, 3)), now)
            case "ran" if asked is not None:
                # The engine's clock is another one: its times may also come to more than we saw.
                times = [data.draw(TICKS) for _ in range(4)]
                breakdown.ran(usage(*times), now)
                asked = None
    now += data.draw(TICKS)
    record = ended(breakdown, now)
    assert sum(record.stages.values()) == record.total_s == now - began
    edges = [0.0, *(lap.end for lap in record.laps)]
    assert [lap.begin for lap in record.laps] == edges[:-1]
    assert edges[-1] == record.total_s


def test_what_the_engine_measured_takes_the_place_of_what_was_seen_of_it():
    breakdown = Breakdown(ORIGIN, 0.0)
    breakdown.enter(Stage.QUEUE, 1.0)
    breakdown.enter(Stage.RENDER, 2.0)
    breakdown.submitted(4.0)
    breakdown.enter(Stage.PREFILL, 9.0)  # the news came late
    breakdown.sampled(1, 9.5)
    breakdown.ran(usage(0.5, 1.0, 2.0, 1.0), 10.0)
    breakdown.enter(Stage.STORE, 10.25)
    record = ended(breakdown, 11.25)
    assert {stage.value: took for stage, took in record.stages.items()} == {
        "parse": 1.0,
        "queue": 1.5,
        "render": 2.0,
        "restore": 1.0,
        "prefill": 2.0,
        "decode": 1.0,
        "store": 1.0,
        "send": 1.75,  # 1.5 from the engine's end to our hearing of it, and 0.25
    }
    assert record.first_token_s == 9.5
    assert record.restore_s == {"host": 0.5, "disk": 0.5}
    assert record.tokens == {"computed": 3, "device": 0, "host": 3, "disk": 4, "remote": 0}
    assert record.prompt_tokens == 10


def test_a_turn_that_is_left_in_the_middle_was_in_the_stage_that_it_was_seen_in():
    breakdown = Breakdown(ORIGIN, 0.0)
    breakdown.submitted(1.0)
    breakdown.enter(Stage.PREFILL, 2.0)
    breakdown.sampled(1, 3.0)
    breakdown.status = Status.ABANDONED
    record = ended(breakdown, 7.0)
    assert record.stages[Stage.QUEUE] == 1.0
    assert record.stages[Stage.PREFILL] == 1.0
    assert record.stages[Stage.DECODE] == 4.0


def test_a_summary_and_its_turn_are_one_account():
    breakdown = Breakdown(ORIGIN, 0.0)
    for at in (0.0, 4.0):
        breakdown.submitted(at)
        breakdown.ran(usage(0.0, 1.0, 2.0, 0.5), at + 4.0)
    record = ended(breakdown, 8.0)
    assert record.stages[Stage.PREFILL] == 4.0
    assert record.prompt_tokens == 20
    assert record.output_tokens == 4
    assert record.recomputed == {"new": 4, "logits": 2}
    assert record.restore_s == {"host": 1.0, "disk": 1.0}


def test_tokens_that_come_together_share_their_time():
    gaps = []
    breakdown = Breakdown(ORIGIN, 0.0, gap=lambda *gap: gaps.append(gap))
    for tokens, now in ((1, 1.0), (1, 1.5), (4, 2.5)):
        breakdown.sampled(tokens, now)
    assert gaps == [(0.5, 1), (0.25, 4)]
    assert sum(seconds * tokens for seconds, tokens in gaps) == 1.5


def test_the_first_token_is_no_gap_and_those_that_come_with_it_are_none_either():
    gaps = []
    breakdown = Breakdown(ORIGIN, 0.0, gap=lambda *gap: gaps.append(gap))
    breakdown.sampled(3, 2.0)
    assert gaps == [(0.0, 2)]
    breakdown.status = Status.COMPLETED
    assert breakdown.record(2.0, 0.0).first_token_s == 2.0


def test_a_log_line_is_one_line_of_names_and_values_without_what_the_client_said():
    breakdown = Breakdown(ORIGIN, 0.0)
    breakdown.session = 'evil"\nturn request=req_2'
    breakdown.response_id = "resp_1"
    breakdown.submitted(0.0)
    breakdown.ran(usage(0.5, 1.0, 2.0, 1.0), 5.0)
    line = ended(breakdown, 5.0).as_logfmt()
    assert "evil" not in line
    assert re.fullmatch(r"turn( [a-z_]+=[^\s=\"]+)+", line)
    fields = dict(word.split("=") for word in line.split()[1:])
    assert fields["request"] == "req_1"
    assert fields["reason"] == "-"
    for stage in Stage:
        assert float(fields[f"{stage.value}_s"]) >= 0
    for source in SOURCES:
        assert int(fields[f"{source}_tokens"]) >= 0


TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (f"00-{TRACE}-{SPAN}-01", TraceContext(TRACE, SPAN, sampled=True)),
        (f"00-{TRACE}-{SPAN}-00", TraceContext(TRACE, SPAN, sampled=False)),
        (f" 00-{TRACE}-{SPAN}-03 ", TraceContext(TRACE, SPAN, sampled=True)),
        (f"cc-{TRACE}-{SPAN}-01-what.comes.later", TraceContext(TRACE, SPAN, sampled=True)),
        (f"00-{TRACE}-{SPAN}-01-not.in.version.0", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{TRACE}-{SPAN}", None),
        (f"00-{TRACE}-{SPAN}-01\n", TraceContext(TRACE, SPAN, sampled=True)),
        ("", None),
        ("é", None),
    ],
)
def test_a_traceparent_is_read_as_the_standard_says_or_not_at_all(header, found):
    assert TraceContext.parse(header) == found
