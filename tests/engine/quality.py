"""What fewer bits cost in quality: compact storage (real text continued after its KV went to disk and back, against exact
KV), and on the CPU KV in float16 and prompts computed in bfloat16, against both in float32.

A text is cut into windows. Of each, the first part is prefilled; its blocks are encoded, decoded in place, and the
rest is predicted from them, every token by the true ones before it; or all of it is computed in the other dtypes. Compared with
the same run on the exact blocks:

    perplexity      of the rest, and by how much the codec changes it
    top-1           share of positions where the likeliest token is the same, of all and of those that exact KV decides
                    by more than 0.1 nat: below that, another order of summation changes it just as well
    divergence      mean KL(exact || restored) per token, in nats

    make quality        or: python -m tests.engine.quality --help
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from engine.attention import PagedForward
from engine.batch import Batch, Segment
from engine.model import LoadedModel, LoadSpec, load
from engine.runner import Runner
from engine.text import Text
from tiers.arena import Arena
from tiers.block import Slot
from tiers.codec import Codec, codec

# On the CPU: what all else is held against, and what may be asked for instead.
DTYPES = (
    {"kv_dtype": "float32", "prefill_dtype": "float32"},
    {"kv_dtype": "float16", "prefill_dtype": "float32"},
    {"kv_dtype": "float16", "prefill_dtype": "bfloat16"},
)
DECIDED = 0.1  # nats between the likeliest token and the next


@dataclass(frozen=True, slots=True)
class Quality:
    """One scheme's sums over `tokens` predicted tokens."""

    scheme: str
    payload_share: float  # of the exact block
    tokens: int
    exact_nats: float
    nats: float
    same: int
    decided: int
    same_decided: int
    divergence: float

    @property
    def exact_perplexity(self) -> float:
        return torch.tensor(self.exact_nats / self.tokens).exp().item()

    @property
    def change(self) -> float:
        """Of perplexity, relative."""
        return torch.tensor((self.nats - self.exact_nats) / self.tokens).expm1().item()

    @property
    def top1(self) -> float:
        return self.same / self.tokens

    @property
    def top1_decided(self) -> float:
        return self.same_decided / self.decided

    @property
    def divergence_per_token(self) -> float:
        return self.divergence / self.tokens

    def plus(self, other: Quality) -> Quality:
        assert self.scheme == other.scheme
        return Quality(
            self.scheme,
            self.payload_share,
            self.tokens + other.tokens,
            self.exact_nats + other.exact_nats,
            self.nats + other.nats,
            self.same + other.same,
            self.decided + other.decided,
            self.same_decided + other.same_decided,
            self.divergence + other.divergence,
        )


def measure(
    loaded: LoadedModel, tokens: list[int], prefix: int, names: tuple[str, ...]
) -> list[Quality]:
    """One window: `prefix` tokens go through each codec, the rest is predicted. `prefix` is whole blocks."""
    size = loaded.geometry.block_tokens
    assert prefix % size == 0
    arena = Arena(loaded.geometry, -(-len(tokens) // size), loaded.device)
    prefill(loaded, arena, tokens[:prefix])
    written = prefix // size
    exact_blocks = arena.blocks[:written].clone()
    exact = logits_of(loaded, arena, tokens, prefix, len(tokens)).log_softmax(1)
    found = []
    for name in names:
        scheme = codec(name, loaded.geometry)
        arena.blocks[:written] = exact_blocks
        for slot in range(written):
            through(scheme, arena.view(Slot(slot)))
        restored = logits_of(loaded, arena, tokens, prefix, len(tokens)).log_softmax(1)
        share = scheme.payload_bytes(loaded.geometry) / loaded.geometry.block_bytes
        found.append(compare(scheme.scheme, share, exact, restored, tokens[prefix:]))
    return found


def measure_dtypes(
    exact: LoadedModel, others: list[LoadedModel], tokens: list[int], prefix: int
) -> list[Quality]:
    """One window: all of it computed as a prompt, by each model in its own dtypes; what is behind `prefix` is predicted."""
    log_probs = [_predicted(loaded, tokens, prefix) for loaded in (exact, *others)]
    return [
        compare(
            f"KV {loaded.geometry.dtype_name}, prompts {str(loaded.prefill_dtype).split('.')[1]}",
            loaded.geometry.block_bytes / exact.geometry.block_bytes,
            log_probs[0],
            own,
            tokens[prefix:],
        )
        for loaded, own in zip(others, log_probs[1:], strict=True)
    ]


def _predicted(loaded: LoadedModel, tokens: list[int], prefix: int) -> torch.Tensor:
    """Log probabilities [tokens behind prefix, vocabulary]."""
    arena = Arena(loaded.geometry, -(-len(tokens) // loaded.geometry.block_tokens), loaded.device)
    batch = batch_of(loaded, tokens, 0, len(tokens), logits=len(tokens) - prefix)
    return Runner(loaded, arena).run(batch).log_softmax(1)


def through(scheme: Codec, block: memoryview) -> None:
    """As if to disk and back, in place."""
    payload = scheme.encode(block)
    room = scheme.room(block)
    room[:] = payload
    scheme.decode(room, block)


def prefill(loaded: LoadedModel, arena: Arena, tokens: list[int]) -> None:
    Runner(loaded, arena).run(batch_of(loaded, tokens, 0, len(tokens)))


def batch_of(
    loaded: LoadedModel, tokens: list[int], begin: int, end: int, logits: int = 1
) -> Batch:
    table = [Slot(slot) for slot in range(-(-end // loaded.geometry.block_tokens))]
    segment = Segment(start=0, count=end - begin, context=end, table=table, logits=logits)
    return Batch(tokens[begin:end], range(begin, end), (segment,))


def logits_of(
    loaded: LoadedModel, arena: Arena, tokens: list[int], begin: int, end: int
) -> torch.Tensor:
    """[end - begin, vocabulary] in float32; writes the KV of these tokens, reads that of all before."""
    batch = batch_of(loaded, tokens, begin, end)
    with torch.inference_mode():
        output = loaded.model(
            input_ids=torch.tensor([batch.tokens], device=loaded.device),
            position_ids=torch.tensor([list(batch.positions)], device=loaded.device),
            use_cache=False,
            paged=PagedForward(batch, arena),
        )
        return output.logits[0].float()


def compare(
    scheme: str, share: float, exact: torch.Tensor, restored: torch.Tensor, truth: list[int]
) -> Quality:
    """Log probabilities [tokens, vocabulary] of two runs. The last row predicts what comes after the text."""
    exact, restored = exact[:-1], restored[:-1]
    targets = torch.tensor(truth[1:], device=exact.device)[:, None]
    best = exact.topk(2, dim=1).values
    decided = best[:, 0] - best[:, 1] > DECIDED
    same = exact.argmax(1) == restored.argmax(1)
    return Quality(
        scheme=scheme,
        payload_share=share,
        tokens=len(targets),
        exact_nats=-exact.gather(1, targets).sum().item(),
        nats=-restored.gather(1, targets).sum().item(),
        same=int(same.sum()),
        decided=int(decided.sum()),
        same_decided=int((same & decided).sum()),
        divergence=(exact.exp() * (exact - restored)).sum().item(),
    )


def table(rows: dict[str, list[Quality]]) -> str:
    """{text: one row per scheme} as Markdown."""
    lines = [
        "| text | scheme | payload | tokens | perplexity, exact | change | top-1 | top-1, decided | KL, nats |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {text} | {one.scheme} | {one.payload_share:.1%} | {one.tokens} | {one.exact_perplexity:.3f} "
        f"| {one.change:+.3%} | {one.top1:.2%} | {one.top1_decided:.2%} | {one.divergence_per_token:.1e} |"
        for text, found in rows.items()
        for one in found
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="the quality of compact storage")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--windows", type=int, default=4, help="of each file, at most")
    parser.add_argument("--prefix", type=int, default=1536)
    parser.add_argument("--rest", type=int, default=512)
    parser.add_argument(
        "--state", type=Path, default=Path(".pytest_cache/d/models"), help="converted models"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    spec = LoadSpec(state_dir=arguments.state, device=arguments.device, dtype=arguments.dtype)
    loaded, others = load(replace(spec, **DTYPES[0])), []
    if loaded.device.type == "cpu":
        others = [load(replace(spec, **dtypes)) for dtypes in DTYPES[1:]]
    text = Text.from_dir(loaded.path)
    names = ("bf16", "int8") if loaded.geometry.dtype_name == "float32" else ("int8",)
    rows: dict[str, list[Quality]] = {}
    length = arguments.prefix + arguments.rest
    for file in arguments.files:
        tokens = list(text.encode(file.read_text()))
        windows = range(0, len(tokens) - length + 1, length)[: arguments.windows]
        for start in tqdm(windows, desc=file.name, file=sys.stderr):
            window = tokens[start : start + length]
            found = measure(loaded, window, arguments.prefix, names)
            found += measure_dtypes(loaded, others, window, arguments.prefix)
            before = rows.get(file.name)
            rows[file.name] = (
                [a.plus(b) for a, b in zip(before, found, strict=True)] if before else found
            )
    print(table(rows))


if __name__ == "__main__":
    main()
