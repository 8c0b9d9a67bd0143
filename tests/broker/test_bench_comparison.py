"""The arithmetic of `homeport bench serve`: what its ratios, its clock and its scaling mean."""

import argparse

import pytest

from broker.bench import serve
from broker.bench.cases import Nonces
from broker.bench.chat import Recorder
from broker.bench.client import Refused
from broker.bench.comparison import (
    Ratio,
    Sample,
    Unit,
    compare,
    gaps_inside,
    gaps_touching,
    lines,
    number,
    quantile,
    whole_turn_s,
)
from broker.bench.conversation import body, opening, result
from broker.bench.report import spoken, table


def samples(side, *values, row="r", unit=Unit.SECONDS, **tokens):
    return [Sample(row, side, at, value, unit, **tokens) for at, value in enumerate(values)]


def only(found):
    (row,) = found
    return row


# ratios


def test_a_gain_in_seconds_is_the_others_median_over_ours_and_its_spread_is_of_rounds():
    both = samples("us", 1.0, 2.0, 4.0) + samples("them", 3.0, 8.0, 4.0)
    row = only(compare(both, "us", "them"))
    assert row.ratio.median == 4.0 / 2.0
    assert (row.ratio.least, row.ratio.most) == (1.0, 4.0)
    assert (row.one.least, row.one.median, row.one.most) == (1.0, 2.0, 4.0)


def test_a_gain_in_rates_is_turned_round_and_a_share_never_is():
    both = samples("us", 30.0, unit=Unit.RATE) + samples("them", 20.0, unit=Unit.RATE)
    assert only(compare(both, "us", "them")).ratio.median == 1.5
    both = samples("us", 3.0) + samples("them", 2.0)
    assert only(compare(both, "us", "them", Ratio.SHARE)).ratio.median == 1.5


def test_several_samples_of_a_round_count_as_their_median_in_its_ratio():
    several = [Sample("r", "us", 0, value) for value in (1.0, 2.0, 9.0)]
    row = only(compare([*several, *samples("them", 4.0)], "us", "them"))
    assert (row.ratio.least, row.ratio.most) == (2.0, 2.0)


def test_a_side_that_was_not_measured_has_no_ratio():
    row = only(compare(samples("us", 1.0), "us", "them"))
    assert (row.other, row.ratio) == (None, None)
    assert lines([row], "us", "them")[1][2:5] == ("1.00", "-", "-")


def test_rows_keep_the_order_in_which_they_came_and_tell_both_sides_tokens():
    both = [
        *samples("us", 1.0, row="b", prompt_tokens=10, cached_tokens=4, output_tokens=3),
        *samples("them", 1.0, row="a", prompt_tokens=9),
        *samples("them", 1.0, row="b", prompt_tokens=10, output_tokens=3),
    ]
    b, a = compare(both, "us", "them")
    assert (b.row, a.row) == ("b", "a")
    assert b.tokens == ("10", "4/-", "3")
    assert a.tokens == ("9", "-", "-")


def test_a_table_counts_the_turns_that_were_scaled():
    scaled = Sample("r", "us", 0, 1.0, scaled=True)
    assert table([scaled, *samples("them", 2.0)], "us", "them")[-1].startswith(
        "1 turns ended early"
    )
    assert "ended" not in "".join(table(samples("us", 1.0), "us", "them"))


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.01234, "0.0123"), (1.234, "1.23"), (99.96, "100"), (123.4, "123"), (51234.0, "51234"), (0, "0")],
)  # fmt: skip
def test_numbers_have_three_digits(value, said):
    assert number(value) == said


def test_quantiles_are_samples():
    assert quantile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0


# turns


def test_a_turn_that_ended_early_is_scaled_by_its_own_decode_rate():
    # 1 s to the first of 5 tokens, then 4 more in 2 s: 24 would have taken 23 times half a second.
    assert whole_turn_s(1.0, 3.0, said=5, wanted=24) == (1.0 + 23 * 0.5, True)


@pytest.mark.parametrize("said", [24, 25, 1, 0])
def test_a_whole_turn_and_one_without_a_rate_stay_as_they_are(said):
    assert whole_turn_s(1.0, 3.0, said, wanted=24) == (3.0, False)


def test_a_gap_that_holds_the_whole_time_touches_it_and_is_not_inside():
    arrivals = [0.0, 1.0, 4.0, 5.0]
    assert gaps_touching(arrivals, 2.0, 3.0) == [3.0]
    assert gaps_inside(arrivals, 2.0, 3.0) == []
    assert gaps_inside(arrivals, 0.0, 4.5) == [1.0, 3.0]
    assert gaps_touching(arrivals, 0.5, 4.5) == [1.0, 3.0, 1.0]
    assert gaps_touching(arrivals, 5.0, 6.0) == []


# chat


def chunk(**delta):
    return {"choices": [{"index": 0, "delta": delta}]}


def recorded(*chunks, ticks):
    clock = iter(ticks)
    recorder = Recorder(lambda: next(clock))
    for each in chunks:
        recorder.feed(each)
    return recorder.end()


def test_the_first_token_is_the_first_delta_that_says_something():
    done = recorded(
        chunk(role="assistant", content=None),
        chunk(content=""),
        chunk(content="a"),
        chunk(content="b"),
        ticks=[10.0, 11.0, 12.0, 13.0, 15.0, 16.0],
    )
    assert (done.ttft_s, done.total_s, done.gaps_s, done.text) == (3.0, 6.0, [2.0], "ab")
    assert done.output_tokens == 2
    assert done.decode_rate == 0.5


def test_thoughts_are_tokens_and_usage_is_the_servers():
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    done = recorded(
        chunk(reasoning_content="hm"),
        chunk(content="a"),
        {"choices": [], "usage": usage},
        ticks=[0.0, 1.0, 3.0, 3.5, 4.0],
    )
    assert (done.ttft_s, done.text, done.output_tokens) == (1.0, "a", 5)
    assert (done.prompt_tokens, done.cached_tokens, done.computed_tokens) == (9, 4, 5)
    assert done.decode_rate == 2.0


def test_silence_is_timed_to_its_end_and_has_no_rate():
    done = recorded(chunk(role="assistant"), ticks=[0.0, 1.0, 2.0])
    assert (done.ttft_s, done.decode_rate) == (2.0, None)


def test_an_error_in_the_stream_is_a_refusal_whatever_its_form():
    for error in ({"message": "no"}, "no"):
        with pytest.raises(Refused, match="no"):
            recorded({"error": error}, ticks=[0.0, 1.0, 2.0])


# words


def test_two_openings_differ_in_digits_of_their_first_line_only():
    one, other = (opening(nonce, 40).messages[0]["content"] for nonce in (7, 99_999))
    differing = [at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    assert 0 < max(differing) < one.index("\n")


def test_a_request_is_greedy_bounded_and_names_a_model_only_if_there_is_one():
    asked = opening(1, 10).answered("yes").asking(result("x", 10))
    request = body(asked, 5, None, {"ignore_eos": True})
    assert (request["temperature"], request["max_tokens"], request["ignore_eos"]) == (0, 5, True)
    assert [message["role"] for message in request["messages"]] == [
        "system", "user", "assistant", "user",
    ]  # fmt: skip
    assert "model" not in request
    assert body(asked, 5, "m", {})["model"] == "m"


def test_digits_are_the_sides_own_in_no_session_and_the_same_for_both():
    nonces = Nonces(99_999)
    assert nonces.of("a", 0) == 99_999
    assert nonces.of("a", 1) == 0
    assert nonces.of("a", 0) == 99_999


def test_results_do_not_tell_where_files_lie():
    command = [
        "/x/homeport",
        "--against-command",
        "/y/llama-server -m /z/m.gguf -t 2",
        "--models=/m/n",
    ]
    assert spoken(command) == (
        "homeport --against-command 'llama-server -m m.gguf -t 2' --models=n"
    )
    assert spoken(["--against", "http://h:1/v1"]) == "--against http://h:1/v1"


# the command line


def arguments(*given):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--sections", "turn,spilling"], "turn: against what?"),
        (["--against-command", "server"], "no {port}"),
        (["--against", "http://h:1", "--slot-files"], "--against-command"),
    ],
)
def test_arguments_that_do_not_go_together_are_wrong_usage(given, said, capsys):
    assert serve.main(arguments(*given)) == 2
    assert said in capsys.readouterr().err


def test_sections_come_in_their_order_and_unknown_ones_are_named(capsys):
    args = arguments("--against", "http://h:1", "--sections", "memory,turn")
    assert serve.plan_of(args).sections == ("turn", "memory")
    with pytest.raises(SystemExit):
        arguments("--sections", "turn,lunch")
    assert "lunch is none of turn" in capsys.readouterr().err


def test_what_is_given_stands_over_the_quick_sizes():
    plan = serve.plan_of(arguments("--quick", "--depth", "77", "--delta", "5", "--crowds", "3"))
    assert (plan.sizes.depth, plan.sizes.delta, plan.sizes.output, plan.rounds) == (77, 5, 8, 1)
    assert (plan.crowd.delta, plan.loop.delta, plan.crowds) == (5, 5, (3,))
    assert plan.sections == ("transports", "interference", "spilling")
