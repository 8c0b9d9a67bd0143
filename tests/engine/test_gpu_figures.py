"""What `make gpu` does to get its figures, on a pretended GPU with no model behind it: the figures mean nothing here, but they come."""

from __future__ import annotations

from queue import SimpleQueue

import pytest
import torch

from engine.transfers import Copier, CudaMemory, Streams, Transfers
from tests.engine.test_engine import AtOnce
from tests.engine.tiny import TINY
from tests.gpu import shapes, timings

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu does it for real")


class Still:
    """A runner that computes nothing: interpreting the model would take minutes."""

    def __init__(self, loaded, arena) -> None:
        self.room = arena.slots * arena.geometry.block_tokens

    def run(self, batch) -> torch.Tensor:
        assert all(segment.context <= self.room for segment in batch.segments)
        return torch.zeros(len(batch.wanted), 97)


def pretended(arenas, block_tokens, reply) -> Transfers:
    stream, jobs = AtOnce(), SimpleQueue()
    memory = CudaMemory(arenas, block_tokens, Streams(stream, stream, stream), jobs)
    return Transfers(memory, (Copier(jobs, arenas, stream, reply),), None)


def test_every_figure_is_measured_and_told(monkeypatch):
    monkeypatch.setattr(timings, "SHALLOW", 9)
    monkeypatch.setattr(timings, "CONTEXT", 64)
    monkeypatch.setattr(timings, "CHUNK", 32)
    monkeypatch.setattr(timings.Transfers, "of", pretended)
    monkeypatch.setattr(timings, "Runner", Still)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    model = shapes.loaded(TINY["qwen3"], "tiny", "cpu", torch.float32)
    machine = timings.Machine(1e9, 1e9, 1e9, 1e9)
    figures = list(timings.figures_of("tiny", model, machine, 1))
    assert len(figures) == 7
    assert all(figure.value > 0 for figure in figures)
    told = timings.table(figures).splitlines()
    assert len({line.index(">= ") for line in told if ">= " in line}) == 1
    assert ("MISSED" in "".join(told)) == (not all(figure.holds for figure in figures))


def test_the_real_shapes_are_the_models_own():
    llama, qwen = shapes.LLAMA_8B, shapes.QWEN_06B
    assert (llama.head_dim, llama.num_hidden_layers, llama.tie_word_embeddings) == (128, 32, False)
    assert (qwen.head_dim, qwen.num_hidden_layers, qwen.tie_word_embeddings) == (128, 28, True)
