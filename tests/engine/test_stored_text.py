"""A stored response is a row of ids: to another tokenizer or template they are other words, so it is not believed."""

from __future__ import annotations

from dataclasses import replace
from queue import SimpleQueue
from types import SimpleNamespace

import pytest

from engine.api import Persist
from engine.service import EngineService
from engine.text import Text, _digest
from tests.fakes import ByteTokenizer
from tiers.manifest import Manifest
from tiers.store import MemoryStore, StoreLimits

FILES = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "vocab.txt": "a",
    "merges.txt": "a b",
    "spiece.model": "\0",
}
SAID = Manifest("resp_1", "t", "s", None, 1.0, True, (1, 2, 3), 2, ("msg_1",), b"d" * 32, (), b"{}")


@pytest.fixture
def directory(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def test_the_digest_changes_with_every_file_that_makes_text_into_ids(directory):
    digests = {_digest(directory, (2,)), _digest(directory, (2, 3))}
    for name in FILES:
        (directory / name).write_text("changed")
        digests.add(_digest(directory, (2,)))
    (directory / "added_tokens.json").write_text("{}")
    digests.add(_digest(directory, (2,)))
    assert len(digests) == len(FILES) + 3


def test_the_digest_does_not_change_with_anything_else(directory, tmp_path_factory):
    before = _digest(directory, (2, 3))
    for name in ("config.json", "model.safetensors", "README.md", "generation_config.json"):
        (directory / name).write_text("{}")
    assert _digest(directory, (3, 2)) == before
    moved = tmp_path_factory.mktemp("elsewhere") / "model"
    directory.rename(moved)
    assert _digest(moved, (2, 3)) == before


def service(store, digest):
    """The real service over a store, without an engine behind it."""
    engine = SimpleNamespace(max_context=8)
    text = Text(ByteTokenizer(), digest=digest)
    parts = SimpleNamespace(
        text=text,
        name="m",
        engine=engine,
        inbox=SimpleQueue(),
        store=store,
        scrubber=None,
        grammars=None,
        grammar_timeout_s=1.0,
        clock=lambda: 0.0,
        transfers=None,
    )
    return EngineService(parts), parts.inbox


def stored(digest, said=SAID):
    """A store in which a daemon with this tokenizer has kept a response."""
    store = MemoryStore(
        fingerprint=b"f" * 32, payload_bytes=8, block_tokens=4, limits=StoreLimits(1 << 20)
    )
    sender, inbox = service(store, digest)
    sender.persist_later(said)
    persist = inbox.get_nowait()
    assert isinstance(persist, Persist)
    store.write(manifests=[persist.manifest])
    return store


async def lookups(one):
    yield await one.find_response("t", "resp_1")
    yield await one.find_item("t", "msg_1")
    yield await one.find_content("t", b"d" * 32)


async def test_what_was_stored_under_this_tokenizer_is_found():
    one, _ = service(stored(b"ours"), b"ours")
    assert [found.tokens async for found in lookups(one)] == [SAID.tokens] * 3


@pytest.mark.parametrize("other", [b"theirs", b""])
async def test_what_was_stored_under_another_is_found_by_nothing(other):
    one, _ = service(stored(other), b"ours")
    assert [found async for found in lookups(one)] == [None] * 3


async def test_what_has_no_tokens_means_the_same_to_every_tokenizer():
    """A conversation is text: another model goes on with it."""
    record = replace(SAID, tokens=(), sampled_from=0)
    one, _ = service(stored(b"theirs", record), b"ours")
    found = await one.find_response("t", "resp_1")
    assert found is not None
    assert found.body == record.body


async def test_it_is_there_again_when_its_tokenizer_is_and_can_be_deleted_meanwhile():
    store = stored(b"ours")
    one, _ = service(store, b"theirs")
    assert await one.find_response("t", "resp_1") is None
    again, _ = service(store, b"ours")
    assert await again.find_response("t", "resp_1") is not None
    assert store.forget_response("t", "resp_1")
