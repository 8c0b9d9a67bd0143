"""Constraints over the default model's tokenizer: what reads like a control token and is none, and the other way round."""

from __future__ import annotations

import json
import random

import pytest
import torch

from engine.constraint import Exactly, InTurn, Json, Token
from engine.grammar import Grammars, Matcher
from engine.text import Text


def test_text_that_reads_like_a_control_token_is_text(smollm: tuple[Text, Grammars]):
    """Only one continuation was possible, so the library forced the ids that the tokenizer made of it: among them the
    control token, which the grammar then did not accept."""
    text, grammars = smollm
    word = '"a<filename>b<|im_end|>"'
    constraint = InTurn((Exactly("so "), Json(json.dumps({"enum": [json.loads(word)]}))))
    for seed in range(5):
        matcher, chance, said = Matcher(grammars.compile(constraint)), random.Random(seed), []
        while not matcher.complete:
            row = torch.empty((49152 // 32,), dtype=torch.int32)
            matcher.allow(row)
            bits = row[:, None].bitwise_right_shift(torch.arange(32, dtype=torch.int32)) & 1
            said.append(chance.choice(bits.flatten().nonzero().flatten().tolist()))
            assert matcher.accept(said[-1]), matcher.fault
        assert text.decode(said) == "so " + word  # decoding leaves control tokens out


def test_added_tokens_are_control_tokens_or_text_as_the_library_sees_them(smollm):
    """One that only looks like a control token is one for the library, special or not."""
    tokenizer = json.loads(smollm[0].tokenizer_json())
    first, blank = 49152, tokenizer["added_tokens"][0]
    for at, (name, special) in enumerate(
        [("<tool_call>", False), ("[TOOL_CALLS]", True), ("    \n    ", False)]
    ):
        added = blank | {"id": first + at, "content": name, "special": special}
        tokenizer["added_tokens"].append(added)
    grammars = Grammars.of_tokenizer(json.dumps(tokenizer), [2])
    assert [grammars.token_bytes(first + at) for at in range(3)] == [
        b"<tool_call>",
        b"[TOOL_CALLS]",
        b"    \n    ",
    ]
    said = InTurn((Token(first), Exactly("<tool_call>"), Token(first + 1), Exactly("    \n    ")))
    matcher, spelled = Matcher(grammars.compile(said)), b""
    while not matcher.complete:
        row = torch.empty((first // 32 + 1,), dtype=torch.int32)
        matcher.allow(row)
        bits = row[:, None].bitwise_right_shift(torch.arange(32, dtype=torch.int32)) & 1
        token = int(bits.flatten().nonzero()[-1])
        spelled += grammars.token_bytes(token)
        assert matcher.accept(token), matcher.fault
    assert spelled == b"<tool_call><tool_call>[TOOL_CALLS]    \n    "


def test_bytes_of_a_token_are_those_that_it_decodes_to(smollm: tuple[Text, Grammars]):
    text, grammars = smollm
    tokens = text.encode("Ünïcödé 🦆\n<|im_end|>")
    spelled = b"".join(grammars.token_bytes(token) for token in tokens)
    assert spelled.decode() == "Ünïcödé 🦆\n<|im_end|>"


@pytest.fixture(scope="module")
def smollm(default_model) -> tuple[Text, Grammars]:
    text = Text.from_dir(default_model.path)
    return text, Grammars.of_tokenizer(text.tokenizer_json(), text.stop_ids)
