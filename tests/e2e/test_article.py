"""The client code that this server was designed around, unchanged but for the URL: no `type` in the first frame,
`response.done` as the end of a turn, and tool results as conversation items."""

import json

from websockets.sync.client import connect

SYSTEM = "You are a coding agent. Use the tools."
TOOLS = [
    {
        "type": "function",
        "name": "read_file",
        "description": "Read a file.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
    }
]


def _wait_for_done(socket):
    """The article's inner loop: read events until the response is done."""
    seen = []
    while True:
        event = json.loads(socket.recv(timeout=120))
        seen.append(event["type"])
        assert event["type"] != "error", event
        if event["type"] == "response.done":
            return event["response"], seen


def test_the_articles_loop_runs_and_each_turn_prefills_only_its_delta(daemon):
    with connect(daemon.url.replace("http", "ws") + "/v1/responses") as socket:
        socket.send(
            json.dumps(
                {
                    "model": "smollm2-135m-instruct",
                    "system": SYSTEM,
                    "tools": TOOLS,
                    "input": [{"role": "user", "content": "Fix the failing test."}],
                    "temperature": 0,
                    "max_output_tokens": 12,
                }
            )
        )
        response, seen = _wait_for_done(socket)
        assert seen[0] == "response.created"
        assert seen[-2] in ("response.completed", "response.incomplete")
        for turn in range(3):
            result = f"tool result {turn}: " + "ok " * 30
            socket.send(
                json.dumps(
                    {
                        "type": "conversation.item.create",
                        "item": {"role": "tool", "content": result},
                    }
                )
            )
            known = response["usage"]["input_tokens"] + response["usage"]["output_tokens"]
            response, _ = _wait_for_done(socket)
            usage = response["usage"]
            assert usage["input_tokens"] > known
            assert usage["input_tokens_details"]["cached_tokens"] >= known - 1
            assert usage["homeport:cached_by_tier"]["device"] >= known - 1


def test_other_connections_are_not_spoken_to_in_that_dialect(daemon):
    with connect(daemon.url.replace("http", "ws") + "/v1/responses") as socket:
        body = {"type": "response.create", "input": "Hi.", "temperature": 0, "max_output_tokens": 4}
        for _ in range(2):
            socket.send(json.dumps(body))
        ended = []
        while len(ended) < 2:
            kind = json.loads(socket.recv(timeout=120))["type"]
            assert kind != "response.done"
            if kind in ("response.completed", "response.incomplete"):
                ended.append(kind)
