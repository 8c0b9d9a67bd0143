"""What clients ask for in each dialect, what is wrong with it, and what they are granted."""

import pytest

from broker.errors import BadRequest
from broker.wire.retention import Retention, asked_ttl, cache_control_ttl


def part(**marked):
    return {
        "input": [
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "a"},
                    {"type": "input_text", "text": "b", "prompt_cache_breakpoint": marked},
                ],
            }
        ]
    }


@pytest.mark.parametrize(
    ("body", "seconds"),
    [
        ({}, None),
        ({"prompt_cache_options": {}}, 1800),
        ({"prompt_cache_options": {"mode": "explicit", "prewarm": True}}, None),
        (part(mode="explicit") | {"prompt_cache_options": {"mode": "explicit"}}, 1800),
        ({"prompt_cache_options": {}, "prompt_cache_retention": "in_memory"}, 1800),
        ({"prompt_cache_options": {"ttl": "30m"}}, 1800),
        ({"prompt_cache_options": {"ttl": "12h"}}, 43200),
        ({"prompt_cache_options": {"ttl": "90s"}}, 90),
        ({"prompt_cache_retention": "in_memory"}, 300),
        ({"prompt_cache_retention": "in-memory"}, 300),
        ({"prompt_cache_retention": "24h"}, 86400),
        ({"prompt_cache_retention": None, "prompt_cache_options": None}, None),
        ({"prompt_cache_retention": "in_memory", "prompt_cache_options": {"ttl": "30m"}}, 1800),
        ({"prompt_cache_retention": "24h", "prompt_cache_options": {"ttl": "30m"}}, 86400),
        (part(mode="explicit"), None),
        (part(mode="explicit", ttl="12h"), 43200),
        (part(ttl="30m") | {"prompt_cache_retention": "in_memory"}, 1800),
        ({"input": "text"}, None),
        ({"input": [{"role": "user", "content": "text"}, "nonsense", {"content": [3]}]}, None),
    ],
)
def test_the_longest_wish_counts(body, seconds):
    assert asked_ttl(body) == seconds


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"prompt_cache_retention": "1h"}, "invalid_value", "prompt_cache_retention"),
        ({"prompt_cache_retention": 24}, "invalid_type", "prompt_cache_retention"),
        ({"prompt_cache_options": "30m"}, "invalid_type", "prompt_cache_options"),
        ({"prompt_cache_options": {"ttl": 30}}, "invalid_type", "prompt_cache_options.ttl"),
        ({"prompt_cache_options": {"ttl": "soon"}}, "invalid_value", "prompt_cache_options.ttl"),
        ({"prompt_cache_options": {"ttl": "0m"}}, "invalid_value", "prompt_cache_options.ttl"),
        ({"prompt_cache_options": {"ttl": "-1h"}}, "invalid_value", "prompt_cache_options.ttl"),
        ({"prompt_cache_options": {"ttl": "1d"}}, "invalid_value", "prompt_cache_options.ttl"),
        ({"prompt_cache_options": {"mode": "never"}}, "invalid_value", "prompt_cache_options.mode"),
        ({"prompt_cache_options": {"prewarm": 1}}, "invalid_type", "prompt_cache_options.prewarm"),
        (
            part(mode="implicit"),
            "invalid_value",
            "input[0].content[1].prompt_cache_breakpoint.mode",
        ),
        (part(ttl="x"), "invalid_value", "input[0].content[1].prompt_cache_breakpoint.ttl"),
    ],
)
def test_what_cannot_be_understood_is_refused_by_name(body, code, param):
    with pytest.raises(BadRequest) as refused:
        asked_ttl(body)
    assert (refused.value.status, refused.value.code, refused.value.param) == (400, code, param)


@pytest.mark.parametrize(
    ("item", "path"),
    [
        ({"role": "assistant", "content": [{"type": "output_text", "text": "a"}]}, "content[0]"),
        ({"type": "function_call_output", "output": [{"type": "text", "text": "a"}]}, "output[0]"),
        ({"type": "message", "role": "user", "content": "a"}, None),
    ],
)
def test_a_breakpoint_where_none_may_be_is_refused(item, path):
    marked = {"mode": "explicit"}
    if path is None:
        body, at = {"input": [item | {"prompt_cache_breakpoint": marked}]}, "input[0]"
    else:
        key = path.partition("[")[0]
        parts = [item[key][0] | {"prompt_cache_breakpoint": marked}]
        body, at = {"input": [item | {key: parts}]}, f"input[0].{path}"
    with pytest.raises(BadRequest) as refused:
        asked_ttl(body)
    assert refused.value.code == "invalid_value"
    assert refused.value.param == f"{at}.prompt_cache_breakpoint"


def test_what_is_granted_is_never_more_than_the_operator_allows():
    retention = Retention(default_s=60, max_s=3600)
    assert [retention.grant(asked) for asked in (None, 30, 3600, 86400)] == [60, 30, 3600, 3600]
    assert Retention(default_s=60, max_s=0).grant(None) == 0


def test_cache_control_is_five_minutes_or_an_hour():
    assert cache_control_ttl({"type": "ephemeral"}, "system[0].cache_control") == 300
    assert cache_control_ttl({"type": "ephemeral", "ttl": "5m"}, "c") == 300
    assert cache_control_ttl({"type": "ephemeral", "ttl": "1h"}, "c") == 3600
    for wrong, param in (
        ({"type": "ephemeral", "ttl": "2h"}, "c.ttl"),
        ({"type": "lasting"}, "c.type"),
        ({}, "c.type"),
    ):
        with pytest.raises(BadRequest) as refused:
            cache_control_ttl(wrong, "c")
        assert refused.value.param == param
