"""The benchmark must measure what it says: its workload, its clock and its summary."""

import json

import pytest

from broker.bench.agent import summarise, table
from broker.bench.client import Collector, Refused
from broker.bench.scenario import COLD, SCENARIOS, Sample
from broker.bench.workload import TOOLS, Workload

LOAD = Workload(nonce=1, system_tokens=500, result_tokens=40, output_tokens=8)


def _completed(**usage):
    return {"type": "response.completed", "response": {"id": "resp_1", "output": [], **usage}}


def test_the_nonce_changes_digits_of_the_first_line_and_nothing_else():
    one, other = LOAD.instructions(), Workload(99_999, 500, 40, 8).instructions()
    differing = [at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    assert differing
    assert max(differing) < one.index("\n")
    assert all(text[at].isdigit() for text in (one, other) for at in differing)


def test_every_function_call_gets_the_result_under_its_own_id():
    output = tuple(
        {"type": "function_call", "call_id": f"call_{n}", "name": "run", "arguments": "{}"}
        for n in range(2)
    )
    news = LOAD.follow(({"type": "message", "content": []}, *output), "x")
    assert [item["call_id"] for item in news] == ["call_0", "call_1"]
    assert {item["type"] for item in news} == {"function_call_output"}


def test_an_answer_without_calls_is_followed_by_the_same_result_from_the_user():
    (news,) = LOAD.follow(({"type": "message", "content": []},), "x")
    (called,) = LOAD.follow(({"type": "function_call", "call_id": "c"},), "x")
    assert (news["role"], news["content"]) == ("user", called["output"])
    assert news["content"] != LOAD.follow((), "y")[0]["content"]


def test_requests_are_greedy_bounded_and_stored():
    body = LOAD.body(LOAD.task(), "resp_1")
    assert body["temperature"] == 0
    assert body["max_output_tokens"] == 8
    assert body["store"] is True
    assert body["previous_response_id"] == "resp_1"
    assert body["tools"] == list(TOOLS)
    json.dumps(body)


def test_the_clock_stops_at_the_first_delta_not_at_the_first_event():
    ticks = iter([10.0, 10.5, 11.0, 12.0, 13.0])
    collector = Collector(lambda: next(ticks))
    assert collector.feed({"type": "response.created"}) is None
    assert collector.feed({"type": "response.output_text.delta"}) is None
    assert collector.feed({"type": "response.output_text.delta"}) is None
    turn = collector.feed(_completed())
    assert (turn.ttft_s, turn.total_s) == (1.0, 3.0)


def test_a_silent_turn_is_timed_to_its_end():
    ticks = iter([1.0, 4.0])
    turn = Collector(lambda: next(ticks)).feed(_completed())
    assert turn.ttft_s == 3.0


def test_an_error_event_is_a_refusal_with_its_code():
    error = {
        "code": "previous_response_not_found",
        "message": "no",
        "param": "previous_response_id",
    }
    with pytest.raises(Refused) as refused:
        Collector(lambda: 0.0).feed({"type": "error", "status": 400, "error": error})
    assert (refused.value.status, refused.value.code) == (400, "previous_response_not_found")


def _sample(name, ttft_s, *, same=None, cached=90, known=91):
    return Sample(name, ttft_s, 100, known, cached, {"device": cached}, {}, same)


def test_rows_compare_medians_with_cold_and_take_the_slowest_as_p95():
    cold = [_sample(COLD, t, cached=0, known=0) for t in (9.0, 10.0, 14.0)]
    warm = [_sample("warm", t, same=True) for t in (3.0, 1.0, 2.0)]
    rows = {row.scenario: row for row in summarise([*warm, *cold])}
    assert list(rows) == [COLD, "warm"]
    assert rows["warm"].ttft_median_s == 2.0
    assert rows["warm"].ttft_p95_s == 3.0
    assert rows["warm"].cold_ratio == pytest.approx(0.2)
    assert rows[COLD].cold_ratio == 1.0
    assert rows["warm"].computed_tokens == 10


def test_one_different_output_spoils_its_row_and_none_judged_is_unknown():
    rows = summarise([_sample("warm", 1.0, same=True), _sample("warm", 1.0, same=False)])
    assert rows[0].same is False
    assert "NO" in table(rows)
    assert summarise([_sample("warm", 1.0)])[0].same is None


def test_one_token_may_be_computed_again_for_its_logits_and_no_more():
    assert _sample("warm", 1.0, cached=90, known=91).recomputed_tokens == 0
    assert _sample("warm", 1.0, cached=89, known=91).recomputed_tokens == 1


def test_every_scenario_has_its_own_name():
    assert len({scenario.name for scenario in SCENARIOS} | {COLD}) == len(SCENARIOS) + 1
