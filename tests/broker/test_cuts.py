"""Where a request's marked places are among its prompt's tokens: never further than the prompt really shares."""

from hypothesis import given
from hypothesis import strategies as st

from broker.cuts import parts_before, token_positions
from broker.recall import Recalled
from broker.session import Part
from broker.turn import conversation
from broker.wire.items import Message
from broker.wire.messages_in import parse_messages
from engine.text import UnrenderableError
from tests.fakes import END, byte_text

MARK = {"type": "ephemeral"}
TEXT = byte_text()


def marked(words, **fields):
    return {"type": "text", "text": words, "cache_control": MARK, **fields}


def parse(*messages, **body):
    said = [
        {"role": ("user", "assistant")[n % 2], "content": one} for n, one in enumerate(messages)
    ]
    return parse_messages({"max_tokens": 1, "messages": said, **body}).turn


def recalled(turn, sampled=None):
    """The turn's items as parts, an assistant's with ids if they are given."""
    parts = tuple(
        Part((item,), sampled if item.role == "assistant" else None) for item in turn.items
    )
    return Recalled(parts, tuple(range(len(parts))), None)


def whole(turn, said):
    return TEXT.prompt(conversation(turn.instructions, turn.tools, said.parts))


def positions(turn, said):
    def prefix(cut, parts):
        instructions = (turn.instructions or "")[: cut.instructions] or None
        return TEXT.prefix(conversation(instructions, turn.tools[: cut.tools], parts))

    return token_positions(turn, said, whole(turn, said), prefix)


def shown(turn, said):
    prompt = whole(turn, said)
    return [TEXT.decode(prompt[:at]) for at in positions(turn, said)]


def test_a_place_inside_a_message_ends_with_its_text():
    turn = parse([marked("ab"), {"type": "text", "text": "cd"}])
    assert shown(turn, recalled(turn)) == ["user\nab"]


def test_a_place_at_the_end_of_a_message_has_what_closes_it():
    turn = parse([marked("ab")])
    said = recalled(turn)
    assert positions(turn, said) == (len(whole(turn, said)) - len("sassistant\n"),)


def test_a_system_block_ends_with_its_text_and_the_last_one_with_the_system_message():
    turn = parse("Hi.", system=[marked("one"), marked("two")])
    assert shown(turn, recalled(turn)) == ["system\none", "system\none\n\ntwo\n"]


def test_a_tool_ends_where_the_template_has_it_behind_the_system_prompt():
    tools = [
        {"name": "ls", "input_schema": {"type": "object"}, "cache_control": MARK},
        {"name": "cat", "input_schema": {"type": "object"}, "cache_control": MARK},
    ]
    turn = parse("Hi.", system="Be brief.", tools=tools)
    [first, last] = shown(turn, recalled(turn))
    assert first.startswith("system\nBe brief.")
    assert '"ls"' in first
    assert '"cat"' not in first
    assert last.endswith("</tool_call>\n")


def test_sampled_ids_before_a_place_are_counted_as_they_are():
    turn = parse("a", "bcd", [marked("e")])
    said = recalled(turn, sampled=(1, 2, 3, 4, 5, END))
    text_only = recalled(turn)
    assert positions(turn, said)[0] == positions(turn, text_only)[0] + 2


def test_a_place_inside_what_was_sampled_is_where_its_text_still_agrees():
    turn = parse("a", [marked("bc"), {"type": "text", "text": "de"}], "f")
    parts = (Part(turn.items[:1]), Part(turn.items[1:3], (*b"bcde", END)), Part(turn.items[3:]))
    said = Recalled(parts, (0, 1, 3), None)
    assert shown(turn, said) == ["user\na\nassistant\nbc"]


def test_a_template_that_refuses_the_cut_promises_nothing():
    turn = parse([marked("ab"), {"type": "text", "text": "cd"}])

    def refusing(_cut, _parts):
        raise UnrenderableError("no")

    assert token_positions(turn, recalled(turn), (1, 2, 3), refusing) == (0,)


words = st.text("ab \n", min_size=1, max_size=4)


@given(st.lists(st.lists(words, min_size=1, max_size=3), min_size=1, max_size=5), st.data())
def test_what_is_before_a_place_does_not_depend_on_what_is_behind_it(script, data):
    script = script if len(script) % 2 else [*script, ["end"]]
    message = data.draw(st.integers(0, len(script) - 1))
    block = data.draw(st.integers(0, len(script[message]) - 1))
    contents = [[{"type": "text", "text": word} for word in said] for said in script]
    contents[message][block]["cache_control"] = MARK
    turn = parse(*contents, system="Be brief.")
    said = recalled(turn)
    [at] = positions(turn, said)
    prompt = whole(turn, said)
    assert 0 < at <= len(prompt)
    [cut] = turn.cuts
    before = "".join(item.text for part in parts_before(cut, turn, said) for item in part.items)
    told = "".join(
        ("\n\n" if role else "").join(said_[: block + 1] if n == message else said_)
        for n, said_ in enumerate(script[: message + 1])
        for role in [n % 2 == 0]
    )
    assert before == told
    other = [*contents[:message], contents[message][: block + 1]]
    other += [[{"type": "text", "text": "zz"}]] * (2 - message % 2 if message % 2 else 0)
    turn = parse(*other, system="Be brief.")
    said = recalled(turn)
    shared = min(at, positions(turn, said)[0])
    assert whole(turn, said)[:shared] == prompt[:shared]


def test_the_first_items_stay_whole_parts():
    turn = parse("a", "b", [marked("c")])
    said = recalled(turn, sampled=(1, END))
    parts = parts_before(turn.cuts[0], turn, said)
    assert parts == (*said.parts[:2], Part((Message(None, "user", "c"),)))
