"""An OpenAI-compatible server without a model: it says as many words as it is asked for, and caches prefixes as one slot does.

    python tests/broker/stub_peer.py --port PORT [--strict] [--slots DIR]

`--strict` refuses fields that Chat Completions does not have, in FastAPI's words. `--slots` makes it llama.cpp's: the slot can
be saved and restored, and it says what it is.
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import takewhile
from pathlib import Path

KNOWN = {"model", "messages", "stream", "stream_options", "temperature", "max_tokens"}


class Server(ThreadingHTTPServer):
    def __init__(self, port: int, slots: Path | None, *, strict: bool) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.slots, self.strict = slots, strict
        self.slot: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            self.say(200, {"status": "ok"})
        elif self.path == "/v1/models":
            self.say(200, {"data": [{"id": "words"}]})
        elif self.path == "/props" and self.server.slots is not None:
            self.say(200, {"build_info": "stub", "total_slots": 1})
        else:
            self.say(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path, _, action = self.path.partition("?action=")
        if path == "/v1/chat/completions":
            self.complete(request)
        elif path == "/slots/0" and self.server.slots is not None:
            file = self.server.slots / request["filename"]
            if action == "save":
                file.write_text(json.dumps(self.server.slot))
            else:
                self.server.slot = json.loads(file.read_text())
            self.say(200, {"filename": request["filename"]})
        else:
            self.say(404, {"detail": "Not Found"})

    def complete(self, request: dict) -> None:
        if self.server.strict and (unexpected := request.keys() - KNOWN):
            self.say(422, {"detail": f"Unexpected fields in the request: {unexpected}"})
            return
        assert request.get("model") == "words"
        prompt = " ".join(message["content"] for message in request["messages"]).split()
        pairs = zip(prompt, self.server.slot, strict=False)
        cached = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        said = [f"{len(prompt)}" for _ in range(request["max_tokens"])]
        self.server.slot = prompt + said
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for delta in (
            {"role": "assistant"},
            {"content": ""},
            *({"content": f"{w} "} for w in said),
        ):
            self.event({"choices": [{"index": 0, "delta": delta}]})
        if request.get("stream_options", {}).get("include_usage"):
            usage = {"prompt_tokens": len(prompt), "completion_tokens": len(said)}
            self.event(
                {
                    "choices": [],
                    "usage": {**usage, "prompt_tokens_details": {"cached_tokens": cached}},
                }
            )
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, chunk: dict) -> None:
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    def say(self, status: int, answer: dict) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--slots", type=Path)
    given = parser.parse_args()
    Server(given.port, given.slots, strict=given.strict).serve_forever()


if __name__ == "__main__":
    main()
