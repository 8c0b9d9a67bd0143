"""One id space, two fashions of prefix: the same response and the same call under the names that each API's clients know.

    resp_X  is  msg_X      a response is a message
    call_X  is  toolu_X    a call is a use of a tool

Laws
    What goes out comes back as the id that it was, so a session can go on in either API. Ids made elsewhere pass
    unchanged but for these prefixes.
"""

from __future__ import annotations


def message_id(response_id: str) -> str:
    return _renamed(response_id, "resp_", "msg_")


def response_id(message_id: str) -> str:
    return _renamed(message_id, "msg_", "resp_")


def tool_use_id(call_id: str) -> str:
    return _renamed(call_id, "call_", "toolu_")


def call_id(tool_use_id: str) -> str:
    return _renamed(tool_use_id, "toolu_", "call_")


def _renamed(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name
