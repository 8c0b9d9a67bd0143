"""Greedy generation over pages equals `generate`, token for token; moved KV goes on as if never moved."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.batch import Batch, Segment
from engine.runner import Runner
from tiers.arena import Arena, copy_block

SIZE = 4  # block tokens of the tiny models
NEW = 8
LENGTHS = [1, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE - 1, 2 * SIZE, 2 * SIZE + 1, *range(10, 42, 2), 41]


def prompts(vocab: int, seed: int = 0) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(3, vocab) for _ in range(length)] for length in LENGTHS]


def generate(model, prompt: list[int], new: int = NEW) -> list[int]:
    """What transformers samples greedily after a prompt; never ends early."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=new,
        min_new_tokens=new,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


class Engine:
    """A toy one: each sequence adds up to `chunk` tokens a step; slots come scrambled, all else is NaN."""

    def __init__(self, loaded, slots: int, seed: int = 0) -> None:
        self.arena = Arena(loaded.geometry, slots)
        self.arena.blocks.fill_(torch.nan)
        self.runner = Runner(loaded, self.arena)
        self.size = loaded.geometry.block_tokens
        self.free = list(range(slots))
        random.Random(seed).shuffle(self.free)

    def segment(self, start: int, table: list[int], past: int, count: int, logits: int) -> Segment:
        while len(table) * self.size < past + count:
            table.append(self.free.pop())
        return Segment(start, count, past + count, table, logits)

    def generate(self, prompts: list[list[int]], chunk: int, new: int = NEW) -> list[list[int]]:
        tokens = [list(prompt) for prompt in prompts]
        tables: list[list[int]] = [[] for _ in prompts]
        computed = [0] * len(prompts)
        while any(len(t) < len(p) + new for t, p in zip(tokens, prompts, strict=True)):
            flat, positions, segments, sampled = [], [], [], []
            for i, sequence in enumerate(tokens):
                past, count = computed[i], min(chunk, len(sequence) - computed[i])
                done = past + count == len(sequence)
                if done and len(sequence) == len(prompts[i]) + new:
                    continue
                segments.append(self.segment(len(flat), tables[i], past, count, int(done)))
                flat += sequence[past : past + count]
                positions += range(past, past + count)
                computed[i] += count
                if done:
                    sampled.append(sequence)
            logits = self.runner.run(Batch(flat, positions, segments))
            assert logits.shape[0] == len(sampled)
            assert logits.dtype is torch.float32
            for sequence, row in zip(sampled, logits, strict=True):
                sequence.append(int(row.argmax()))
        return [t[len(p) :] for t, p in zip(tokens, prompts, strict=True)]

    def extend(self, table: list[int], tokens: list[int], past: int) -> torch.Tensor:
        """Logits after `tokens`, which follow `past` others."""
        segment = self.segment(0, table, past, len(tokens), logits=1)
        positions = range(past, past + len(tokens))
        return self.runner.run(Batch(tokens, positions, [segment]))[0]


@pytest.fixture(scope="module")
def expected(pair):
    loaded, plain = pair
    return [generate(plain, prompt) for prompt in prompts(loaded.vocab_size)]


def test_prompts_are_a_fair_test(pair, expected):
    assert len(expected) >= 20
    assert len({tuple(answer) for answer in expected}) == len(expected)
    assert len({token for answer in expected for token in answer}) > 20


@pytest.mark.parametrize("chunk", [3, 11, 64])
def test_all_prompts_in_one_batch_equal_generate(pair, expected, chunk):
    loaded, _ = pair
    engine = Engine(loaded, slots=sum(-(-(n + NEW) // SIZE) for n in LENGTHS), seed=chunk)
    assert engine.generate(prompts(loaded.vocab_size), chunk) == expected


def test_each_prompt_alone_equals_generate(pair, expected):
    loaded, _ = pair
    for prompt, answer in zip(prompts(loaded.vocab_size), expected, strict=True):
        engine = Engine(loaded, slots=-(-(len(prompt) + NEW) // SIZE), seed=len(prompt))
        assert engine.generate([prompt], chunk=7) == [answer]


def test_sequences_share_the_blocks_of_a_common_prefix(pair):
    loaded, plain = pair
    head = prompts(loaded.vocab_size, seed=5)[-1][: 3 * SIZE]
    tails = [[5], [9, 8, 7], list(range(20, 20 + 11))]
    engine = Engine(loaded, slots=20)
    shared: list[int] = []
    engine.extend(shared, head, past=0)
    before = engine.arena.blocks[shared].clone()
    flat, positions, segments = [], [], []
    for tail in tails:
        segments.append(engine.segment(len(flat), list(shared), len(head), len(tail), logits=1))
        flat += tail
        positions += range(len(head), len(head) + len(tail))
    logits = engine.runner.run(Batch(flat, positions, segments))
    for tail, row in zip(tails, logits, strict=True):
        assert [int(row.argmax())] == generate(plain, head + tail, new=1)
    assert torch.equal(engine.arena.blocks[shared], before)


@pytest.mark.parametrize("length", [1, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE, 3 * SIZE + 2])
def test_kv_that_went_away_and_came_back_goes_on_identically(pair, length):
    """Device to host, host to other device slots: equal bytes, and so equal logits to the last bit."""
    loaded, _ = pair
    prompt = prompts(loaded.vocab_size, seed=2)[-1][:length]
    stayed, moved = Engine(loaded, 8, seed=1), Engine(loaded, 8, seed=2)
    first: list[int] = []
    stayed.extend(first, prompt, past=0)
    host = Arena(loaded.geometry, len(first))
    for place, slot in enumerate(first):
        copy_block(stayed.arena, slot, host, place)
    table = [moved.free.pop() for _ in first]
    for place, slot in enumerate(table):
        moved.arena.write(slot, host.read(place))
    assert [moved.arena.read(s) for s in table] == [stayed.arena.read(s) for s in first]
    for past, fresh in [(length, [17]), (length + 1, list(range(30, 43))), (length + 14, [3, 4])]:
        one = stayed.extend(first, fresh, past)
        other = moved.extend(table, fresh, past)
        assert torch.equal(one, other)
        assert one.isfinite().all()


def test_a_batch_without_samples_only_writes(pair):
    loaded, _ = pair
    engine = Engine(loaded, 4)
    logits = engine.runner.run(Batch([5, 6, 7], range(3), [engine.segment(0, [], 0, 3, logits=0)]))
    assert logits.shape == (0, loaded.vocab_size)
    written = engine.arena.blocks.isfinite().sum() * engine.arena.geometry.dtype.itemsize
    assert written == 3 * loaded.geometry.token_bytes


def test_runner_refuses_an_arena_of_another_shape(pair):
    loaded, _ = pair
    with pytest.raises(AssertionError, match="another model"):
        Runner(loaded, Arena(replace(loaded.geometry, block_tokens=8), 2))


def test_default_model_answers_a_chat_as_generate_does(default_model):
    tokenizer = AutoTokenizer.from_pretrained(default_model.path)
    asked = [{"role": "user", "content": "Write a short poem about harbours and ships, please."}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert len(prompt) > default_model.geometry.block_tokens
    plain = AutoModelForCausalLM.from_pretrained(default_model.path).eval()
    answer = generate(plain, prompt, new=24)
    assert len(set(answer)) > 10
    engine = Engine(default_model, slots=3)
    assert engine.generate([prompt], chunk=29, new=24) == [answer]
