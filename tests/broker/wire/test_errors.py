"""Each error as HTTP and as a WebSocket event, in the shapes that clients were seen to need."""

import json

import pytest

from broker.errors import (
    BadRequest,
    BrokerError,
    ClientError,
    ContextTooLong,
    Forbidden,
    NotFound,
    Overloaded,
    TooLarge,
    TurnFailed,
    Unauthorized,
    UnknownResponse,
    UnsupportedContent,
    anthropic_body,
    anthropic_error_type,
    anthropic_status,
    error_event,
    http_body,
)

EVERY_ERROR = [
    BadRequest("m", param="input", code="invalid_type"),
    UnsupportedContent("m", param="input[0]"),
    ContextTooLong(limit_tokens=10, prompt_tokens=11),
    UnknownResponse("resp_abc"),
    Unauthorized("m"),
    Forbidden("m"),
    NotFound("m"),
    TooLarge("m"),
    ClientError("m", status=426),
    Overloaded("m", retry_after_s=2),
    TurnFailed("m"),
]


@pytest.mark.parametrize("error", EVERY_ERROR, ids=lambda error: type(error).__name__)
def test_every_error_has_a_string_code_and_an_integer_status(error):
    event = error_event(error, stream_id="main")
    assert event["type"] == "error"
    assert isinstance(event["status"], int)
    assert event["stream_id"] == "main"
    assert "stream_id" not in error_event(error)
    inner = event["error"]
    assert set(inner) == {"message", "type", "param", "code"}
    assert all(isinstance(inner[key], str) and inner[key] for key in ("message", "type", "code"))
    assert http_body(error) == {"error": inner}
    assert 400 <= error.status < 600
    assert str(error) == error.message
    json.dumps(event)


def test_an_unknown_response_is_said_as_openai_says_it():
    assert error_event(UnknownResponse("resp_abc"), stream_id="main") == {
        "type": "error",
        "status": 400,
        "stream_id": "main",
        "error": {
            "type": "invalid_request_error",
            "code": "previous_response_not_found",
            "message": "Previous response with id 'resp_abc' not found.",
            "param": "previous_response_id",
        },
    }


@pytest.mark.parametrize(("wait_s", "header"), [(0, "1"), (0.2, "1"), (1.2, "2"), (3, "3")])
def test_overload_is_503_over_http_and_429_in_an_event_and_says_when_to_return(wait_s, header):
    error = Overloaded("busy", retry_after_s=wait_s)
    assert error.status == 503
    assert error_event(error)["status"] == 429
    assert error_event(error)["headers"] == error.headers == {"retry-after": header}


def test_other_errors_carry_no_headers():
    assert "headers" not in error_event(TurnFailed("m"))


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (BadRequest("m"), 400, "invalid_request"),
        (UnsupportedContent("m"), 400, "unsupported_content"),
        (ContextTooLong(limit_tokens=10, prompt_tokens=11), 400, "context_length_exceeded"),
        (Unauthorized("m"), 401, "invalid_api_key"),
        (Forbidden("m"), 403, "forbidden"),
        (NotFound("m"), 404, "not_found"),
        (TooLarge("m"), 413, "request_too_large"),
        (ClientError("m", status=426, code="upgrade_required"), 426, "upgrade_required"),
        (TurnFailed("m"), 500, "server_error"),
    ],
)
def test_statuses_and_codes(error, status, code):
    assert (error.status, error.event_status, error.code) == (status, status, code)


def test_a_context_that_is_too_long_says_both_numbers():
    message = ContextTooLong(limit_tokens=8192, prompt_tokens=9000).message
    assert "8192" in message
    assert "9000" in message


def test_client_errors_are_told_from_ours():
    assert issubclass(ClientError, BrokerError)
    assert not issubclass(Overloaded, ClientError)
    assert not issubclass(TurnFailed, ClientError)


@pytest.mark.parametrize(
    ("error", "status", "kind", "message"),
    [
        (BadRequest("m", param="input", code="c"), 400, "invalid_request_error", "messages: m"),
        (BadRequest("'top_k' is m", param="top_k"), 400, "invalid_request_error", "'top_k' is m"),
        (BadRequest("m", param="tools[0].type"), 400, "invalid_request_error", "tools[0].type: m"),
        (
            ContextTooLong(limit_tokens=10, prompt_tokens=11),
            400,
            "invalid_request_error",
            "prompt is too long: 11 tokens > 10 maximum",
        ),
        (Unauthorized("m"), 401, "authentication_error", "m"),
        (Forbidden("m"), 403, "permission_error", "m"),
        (NotFound("m"), 404, "not_found_error", "m"),
        (ClientError("m", status=405), 405, "invalid_request_error", "m"),
        (ClientError("m", status=408), 408, "timeout_error", "m"),
        (TooLarge("m"), 413, "request_too_large", "m"),
        (ClientError("m", status=415), 415, "invalid_request_error", "m"),
        (ClientError("m", status=421), 421, "permission_error", "m"),
        (ClientError("m", status=429), 429, "rate_limit_error", "m"),
        (Overloaded("m", retry_after_s=2), 529, "overloaded_error", "m"),
        (TurnFailed("m"), 500, "api_error", "m"),
    ],
)
def test_each_error_in_anthropics_words(error, status, kind, message):
    assert anthropic_status(error) == status
    assert anthropic_body(error, "req_1") == {
        "type": "error",
        "error": {"type": kind, "message": message},
        "request_id": "req_1",
    }


def test_a_gateways_timeout_is_told_apart():
    assert anthropic_error_type("server_error", 504) == "timeout_error"
