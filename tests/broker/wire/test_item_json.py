"""Items on their way out: read back as they were, and of the published types."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.conversations import ConversationItem
from openai.types.responses import ResponseItem
from pydantic import TypeAdapter

from broker.wire.item_json import item_json, item_prefix
from broker.wire.items import (
    Compaction,
    FunctionCall,
    FunctionCallOutput,
    ItemReference,
    Message,
    Reasoning,
    parse_items,
)

PUBLISHED = (TypeAdapter(ConversationItem), TypeAdapter(ResponseItem))
texts = st.text(max_size=3)
names = st.text(min_size=1, max_size=3)
ids = st.none() | names
items = (
    st.builds(Message, ids, st.sampled_from(["user", "assistant", "system", "developer"]), texts)
    | st.builds(FunctionCall, ids, names, names, texts, ids)
    | st.builds(FunctionCallOutput, ids, names, texts)
    | st.builds(Reasoning, ids, texts, st.none() | texts)
    | st.builds(Compaction, ids, texts)
    | st.builds(ItemReference, names)
)


@given(items)
def test_an_item_is_read_back_as_it_was(item):
    listed = item_json(item, "default")
    [back] = parse_items([listed])
    assert listed["id"] == (item.id or "default")
    fields = {name: getattr(item, name) for name in item.__slots__ if name != "id"}
    assert {name: getattr(back, name) for name in fields} == fields
    assert type(back) is type(item)


@pytest.mark.parametrize("published", PUBLISHED)
@given(item=items.filter(lambda item: not isinstance(item, ItemReference)))
def test_an_item_is_of_its_published_type(published, item):
    published.validate_python(item_json(item, "default"), strict=True)


@given(items)
def test_an_id_says_the_kind(item):
    assert item_prefix(item) in ("msg", "fc", "fco", "rs", "cmp", "ref")
