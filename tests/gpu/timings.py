"""How near the CUDA path comes to what the machine can do. Every figure is a median, or the best of some for a peak."""

from __future__ import annotations

import gc
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING

import torch

from engine import kernels_cuda
from engine.runner import Runner
from engine.transfers import Transfers
from tests.gpu.shapes import (
    BLOCK_TOKENS,
    LLAMA_8B,
    QWEN_06B,
    batch_of,
    loaded,
    prefill_flops,
    weight_bytes,
)
from tiers.arena import Arena
from tiers.block import BlockKey, Copy, Tier
from tiers.disk import Landed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from engine.model import LoadedModel

SHALLOW = 256
CONTEXT = 8192
CHUNK = 8192  # as config/large-gpu.toml


@dataclass(frozen=True)
class Figure:
    model: str
    what: str
    value: float
    bound: str  # ">= 0.70", "<= 0.10", or "" for what is merely told
    detail: str

    @property
    def holds(self) -> bool:
        if not self.bound:
            return True
        relation, limit = self.bound.split()
        return self.value >= float(limit) if relation == ">=" else self.value <= float(limit)


def table(figures: list[Figure]) -> str:
    rows = [("model", "figure", "value", "bound", "", "of")]
    rows += [
        (
            each.model,
            each.what,
            f"{each.value:.3f}",
            each.bound,
            "" if not each.bound else "ok" if each.holds else "MISSED",
            each.detail,
        )
        for each in figures
    ]
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def seconds(run: Callable[[], object], repeats: int, warm: int = 2) -> list[float]:
    """Each run, waited for."""
    for _ in range(warm):
        run()
    spent = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
    return spent


@dataclass(frozen=True)
class Machine:
    """What the GPU and its link can do, by torch's plainest means. Bytes, or operations, per second."""

    hbm: float
    hbm_copied: float
    products: float
    link: float

    @classmethod
    def measured(cls) -> Machine:
        gib = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        other = torch.empty_like(gib)
        copied = 2 * gib.numel() / min(seconds(lambda: other.copy_(gib), 10))
        pinned = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
        link = gib.numel() / min(seconds(lambda: gib.copy_(pinned, non_blocking=True), 5))
        square = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
        product = torch.empty_like(square)
        products = 2 * 8192**3 / min(seconds(lambda: torch.mm(square, square, out=product), 10))
        properties = torch.cuda.get_device_properties(0)
        clock = getattr(properties, "memory_clock_rate", 0)  # kHz; two transfers a cycle
        width = getattr(properties, "memory_bus_width", 0)  # bits
        nominal = 2e3 * clock * width / 8
        return cls(nominal or copied, copied, products, link)


class Rig:
    """A model between a device and a host arena, with its threads."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.blocks = -(-CONTEXT // BLOCK_TOKENS)
        self.device = Arena(loaded.geometry, 2 * self.blocks + 8, loaded.device)
        self.host = Arena(loaded.geometry, self.blocks)
        self.device.blocks.zero_()
        self.replies: SimpleQueue[object] = SimpleQueue()
        self.transfers = Transfers.of(
            {Tier.DEVICE: self.device, Tier.HOST: self.host}, BLOCK_TOKENS, self.replies.put
        )
        self.runner = Runner(loaded, self.device)
        self.own = list(range(self.blocks + 1))  # of the sequence that runs
        self.guests = list(
            range(self.blocks + 1, 2 * self.blocks + 1)
        )  # of the one that is restored

        starts = range(0, CONTEXT, CHUNK)
        self.chunks = [batch_of([self.own], [(at, min(CHUNK, CONTEXT - at))]) for at in starts]

    def key(self, slot: int) -> BlockKey:
        return BlockKey(slot.to_bytes(32, "big"))

    def fill_host(self) -> None:
        for slot in range(self.blocks):
            self.transfers.memory.copy(
                Copy(self.key(slot), Tier.DEVICE, self.own[slot], Tier.HOST, slot)
            )

    def start_restore(self) -> None:
        for slot in range(self.blocks):
            copy = Copy(self.key(slot), Tier.HOST, slot, Tier.DEVICE, self.guests[slot])
            self.transfers.memory.copy(copy)

    def end_restore(self) -> None:
        for _ in range(self.blocks):
            reply = self.replies.get()
            assert isinstance(reply, Landed), reply

    def restore(self) -> None:
        self.start_restore()
        self.end_restore()

    def prefill(self) -> int:
        """Of the whole context; the id after it."""
        for chunk in self.chunks:
            logits = self.runner.run(chunk)
        return int(logits[0].argmax())

    def decode(self, past: int, table: list[int] | None = None) -> int:
        logits = self.runner.run(batch_of([table or self.own], [(past, 1)]))
        return int(logits[0].argmax())  # as the sampler: the step's one wait


@contextmanager
def running(rig: Rig) -> Iterator[Rig]:
    workers = rig.transfers.workers
    with ThreadPoolExecutor(len(workers)) as pool:
        jobs = [pool.submit(worker.run) for worker in workers]
        try:
            if rig.transfers.pinner is not None:
                jobs[-1].result()  # everything is pinned
            yield rig
        finally:
            for worker in workers:
                worker.stop()
            for job in jobs:
                job.result()
            rig.transfers.close()


def figures_of(name: str, loaded: LoadedModel, machine: Machine, repeats: int) -> Iterator[Figure]:
    geometry, weights = loaded.geometry, weight_bytes(loaded)
    with running(Rig(loaded)) as rig, torch.inference_mode():
        cold = statistics.median(seconds(rig.prefill, max(3, repeats // 10)))
        rate = prefill_flops(loaded, CONTEXT) / cold
        yield Figure(
            name,
            f"prefill of {CONTEXT}",
            rate / machine.products,
            ">= 0.50",
            f"{machine.products / 1e12:.0f} TFLOP/s in bf16 products; {CONTEXT / cold:.0f} tokens/s",
        )
        x = torch.randn(1, loaded.model.config.hidden_size, device=loaded.device).to(loaded.dtype)
        weight = loaded.model.get_output_embeddings().weight
        ours, library = (
            min(seconds(partial(product, x, weight), repeats))
            for product in (kernels_cuda.multiply_row, torch.nn.functional.linear)
        )
        yield Figure(
            name,
            "head's product of one token, ours / cuBLAS's time",
            ours / library,
            "",
            f"{1e6 * ours:.0f} us; {weight.nbytes / ours / 1e9:.0f} GB/s",
        )
        for depth in (SHALLOW, CONTEXT - 1):
            step = statistics.median(seconds(lambda depth=depth: rig.decode(depth), repeats))
            moved = (weights + (depth + 1) * geometry.token_bytes) / step
            yield Figure(
                name,
                f"decode behind {depth}",
                moved / machine.hbm,
                ">= 0.70",
                f"{machine.hbm / 1e9:.0f} GB/s ({machine.hbm_copied / 1e9:.0f} by copying); {1 / step:.0f} tokens/s",
            )
        rig.fill_host()
        spent = statistics.median(seconds(rig.restore, 5))
        volume = rig.blocks * geometry.block_bytes
        yield Figure(
            name,
            "restore, host to device",
            volume / spent / machine.link,
            ">= 0.85",
            f"{machine.link / 1e9:.1f} GB/s pinned; {volume / 1e6:.0f} MB, seals checked",
        )

        def warm() -> None:
            rig.restore()
            rig.decode(CONTEXT - 1, rig.guests)

        again = statistics.median(seconds(warm, 5))
        yield Figure(
            name,
            f"TTFT at {CONTEXT}, restored / cold",
            again / cold,
            "<= 0.10" if name.startswith("Llama") else "",
            f"{1e3 * cold:.0f} ms cold, {1e3 * again:.1f} ms restored",
        )
        alone = [s for _ in range(2) for s in seconds(lambda: rig.decode(SHALLOW), repeats)]
        beside: list[float] = []
        while len(beside) < 2 * repeats:
            rig.start_restore()
            while rig.replies.qsize() < rig.blocks:
                began = time.perf_counter()
                rig.decode(SHALLOW)
                beside.append(time.perf_counter() - began)
            rig.end_restore()
        yield Figure(
            name,
            "time between tokens, during restores / without",
            statistics.median(beside) / statistics.median(alone),
            "<= 1.03",
            f"{1e3 * statistics.median(alone):.2f} ms; {len(beside)} steps",
        )


def measure(*, quick: bool) -> list[Figure]:
    machine = Machine.measured()
    shapes = (
        {"Qwen3-0.6B": QWEN_06B} if quick else {"Llama-3.1-8B": LLAMA_8B, "Qwen3-0.6B": QWEN_06B}
    )
    figures: list[Figure] = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16, random weights")
    for name, config in shapes.items():
        began = time.monotonic()
        print(f"{name}: making weights", flush=True)
        model = loaded(config, name, "cuda", torch.bfloat16)
        for figure in figures_of(name, model, machine, 20 if quick else 50):
            figures.append(figure)
            print(f"  {figure.what}: {figure.value:.3f} {figure.bound}", flush=True)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return figures
