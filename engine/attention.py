"""Paged attention behind transformers' attention registry: how a model's layers find their KV in the arena.

Laws
    The KV of a batch's tokens is written before any of them is attended to, one indexed write per layer.
    What attention reads is decided by block tables alone. Rows of a slot beyond a sequence's context are
    never read, or are masked before they can matter: they may hold anything, NaN included.
    A sequence's result does not depend on which slots hold it.

How it works
    A model is loaded with `attn_implementation=NAME`. Its forward is given `paged=...`, which transformers
    hands through to `_paged_attention` in every layer; no mask function is registered under NAME, so
    transformers builds no masks.
    The runner passes a `PagedForward`, made once per batch. Per layer it writes, then attends:

    which segments                  how
    few query tokens                in place, engine/paged_cpu.py or engine/paged_cuda.py; without Triton: padded tables, gathered
    many                            that layer's blocks gathered; on the CPU `attend_in_parts`, on CUDA SDPA with a lower-right
                                    causal mask, which torch's flash attention knows without being shown one

    On the CPU, KV may be narrower than what is computed with it (float16 beside float32): it is narrowed when it is
    written and widened when it is read, so a token sees its own batch's KV as every later one will.

    A forward pass of our own (engine/fused_cuda.py, engine/prefill_cpu.py) writes KV itself, and asks for the second half alone: `read`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from engine import paged_cpu, paged_cuda
from engine.batch import padded_tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.batch import Batch, Segment
    from tiers.arena import Arena

NAME = "homeport_paged"


class Paged(Protocol):
    """Answers every layer's call for attention during one forward."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,  # [query_heads, tokens, head_dim]
        key: torch.Tensor,  # [kv_heads, tokens, head_dim]
        value: torch.Tensor,  # [kv_heads, tokens, head_dim]
        scaling: float,
    ) -> torch.Tensor: ...  # [tokens, query_heads, head_dim]


class UnknownAttention(Exception):
    """The model asks for attention that this file does not compute."""


def backend(device: torch.device, prefill: torch.dtype) -> str:
    """Which of the kernels below compute, for who must tell their rounding apart."""
    if device.type == "cpu":
        return f"fused_cpu, prefill_cpu {str(prefill).removeprefix('torch.')}, paged_cpu, sdpa cpu"
    own = "fused_cuda, paged_cuda, " if paged_cuda.available() else ""
    return f"{own}sdpa {device.type}"


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers. Again is harmless."""
    AttentionInterface.register(NAME, _paged_attention)


def _paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    paged: Paged | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,  # wider than the context, or the model is refused at load
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Called by transformers in each layer with [1, heads, tokens, head_dim]."""
    if attention_mask is not None:
        raise UnknownAttention("it builds attention masks of its own")
    if paged is None:
        raise UnknownAttention("it does not hand its arguments on to its attention")
    asked = sorted(name for name in _NOT_COMPUTED & rest.keys() if rest[name] is not None)
    if asked:
        raise UnknownAttention(f"its attention needs {', '.join(asked)}")
    assert dropout == 0.0, "this is inference"
    layer = module.layer_idx
    assert isinstance(layer, int)
    return paged.attend(layer, query[0], key[0], value[0], scaling)[None], None


# What other architectures pass to change the scores; to ignore one would be wrong KV and wrong tokens.
_NOT_COMPUTED = frozenset({"softcap", "s_aux"})


@dataclass(frozen=True, slots=True)
class Padded:
    """Segments with one query token each, as one batch of tables padded to the longest."""

    rows: torch.Tensor  # [sequences] index of each query token
    tables: torch.Tensor  # [sequences, blocks]
    unseen: torch.Tensor  # [sequences, 1, 1, blocks * block_tokens] True where there is no token


@dataclass(frozen=True, slots=True)
class Many:
    """One segment with many query tokens."""

    start: int
    count: int
    context: int
    table: torch.Tensor  # [blocks]
    mask: CausalBias | None  # None without a past, and on the CPU


class PagedForward:
    """One batch's view of the arena: where its tokens' KV goes, and what each of them may see."""

    __slots__ = ("_arena", "_few", "_many", "_padded", "_paged", "_rows", "_slots")

    def __init__(self, batch: Batch, arena: Arena) -> None:
        self._arena = arena
        size = arena.geometry.block_tokens
        on_cpu = arena.device.type == "cpu"
        few: list[Segment] = []
        many: list[Segment] = []
        in_place = not on_cpu and paged_cuda.available()
        at_most = 1
        if on_cpu or in_place:
            at_most = paged_cpu.MAX_QUERIES if on_cpu else paged_cuda.MAX_QUERIES
        for segment in batch.segments:
            (few if segment.count <= at_most else many).append(segment)
        rows = [position % size for position in batch.positions]
        self._slots = torch.tensor(batch.slots(size), device=arena.device)  # [tokens]
        self._rows = torch.tensor(rows, device=arena.device)  # [tokens]
        self._few = paged_cpu.plan(few, size) if few and on_cpu else None
        self._paged = paged_cuda.plan(few, arena) if few and in_place else None
        self._padded = pad(few, arena) if few and not on_cpu and not in_place else None
        self._many = [_many(segment, arena) for segment in many]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Write this layer's fresh keys and values, and attend. Shapes are those of `Paged.attend`."""
        here = self._arena.blocks[:, layer]  # [slots, 2, kv_heads, block_tokens, head_dim]
        fresh = torch.stack((key, value)).permute(2, 0, 1, 3)  # [tokens, 2, kv_heads, head_dim]
        here[self._slots, :, :, self._rows] = narrowed(fresh, here.dtype)
        tokens = query.transpose(0, 1).contiguous()  # [tokens, query_heads, head_dim]
        return self.read(layer, tokens, scaling)

    def read(
        self,
        layer: int,
        tokens: torch.Tensor,  # [tokens, query_heads, head_dim] contiguous
        scaling: float,
    ) -> torch.Tensor:
        """Attend, this layer's keys and values being written."""
        out = torch.empty_like(tokens)
        here = self._arena.blocks[:, layer]  # [slots, 2, kv_heads, block_tokens, head_dim]
        if self._few is not None:
            paged_cpu.attend(tokens, self._arena.blocks, layer, self._few, scaling, out)
        if self._paged is not None:
            paged_cuda.attend(tokens, self._arena, layer, self._paged, scaling, out)
        if self._padded is not None:
            out[self._padded.rows] = attend_padded(
                tokens[self._padded.rows], here, self._padded, scaling
            )
        for many in self._many:
            run = slice(many.start, many.start + many.count)
            keys, values = _gather(here, many.table)[:, :, : many.context].to(tokens.dtype)
            if many.context > many.count and many.mask is None:
                out[run] = attend_in_parts(tokens[run].transpose(0, 1), keys, values, scaling)
                continue
            attended = scaled_dot_product_attention(
                tokens[run].transpose(0, 1)[None],
                keys[None],
                values[None],
                attn_mask=many.mask,
                is_causal=many.mask is None,
                scale=scaling,
                enable_gqa=True,
            )
            out[run] = attended[0].transpose(0, 1)
        return out


def pad(segments: Sequence[Segment], arena: Arena) -> Padded:
    size, device = arena.geometry.block_tokens, arena.device
    tables = padded_tables(segments, size)
    contexts = torch.tensor([segment.context for segment in segments], device=device)
    unseen = torch.arange(len(tables[0]) * size, device=device)[None] >= contexts[:, None]
    return Padded(
        rows=torch.tensor([segment.start for segment in segments], device=device),
        tables=torch.tensor(tables, device=device),
        unseen=unseen[:, None, None],
    )


def attend_padded(
    query: torch.Tensor,  # [sequences, query_heads, head_dim]
    here: torch.Tensor,  # [slots, 2, kv_heads, block_tokens, head_dim] one layer
    padded: Padded,
    scaling: float,
) -> torch.Tensor:
    """Attention of one token per sequence. [sequences, query_heads, head_dim]."""
    gathered = here[padded.tables]  # [sequences, blocks, 2, kv_heads, block_tokens, head_dim]
    sequences, blocks, _, kv_heads, size, head_dim = gathered.shape
    gathered = gathered.permute(2, 0, 3, 1, 4, 5)
    gathered = gathered.reshape(2, sequences, kv_heads, blocks * size, head_dim)
    # What is not there may be NaN, and NaN times a weight of zero is NaN: blank it.
    keys, values = gathered.masked_fill(padded.unseen.transpose(2, 3), 0)
    attended = scaled_dot_product_attention(
        query[:, :, None], keys, values, attn_mask=~padded.unseen, scale=scaling, enable_gqa=True
    )
    return attended[:, :, 0]


def attend_in_parts(
    query: torch.Tensor,  # [query_heads, count, head_dim] the last tokens
    keys: torch.Tensor,  # [kv_heads, context, head_dim]
    values: torch.Tensor,  # as `keys`
    scaling: float,
) -> torch.Tensor:
    """Causal attention of the last tokens of a context, on the CPU. [count, query_heads, head_dim].

    Over the past, of which every token sees all, without a mask and for all heads of a group at once; over the last tokens
    themselves with a causal one, of which half is left out; joined by the weights of their softmax. A seventh faster than
    one call with a mask. Of torch's attentions on the CPU, the one below alone gives those weights.
    """
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
    heads, count, size = query.shape
    kv_heads, past = keys.shape[0], keys.shape[1] - count
    grouped = query.reshape(1, kv_heads, -1, size)
    of_past, past_weight = attend(
        grouped, keys[None, :, :past], values[None, :, :past], scale=scaling
    )
    fresh = torch.stack((keys[:, past:], values[:, past:])).repeat_interleave(
        heads // kv_heads, dim=1
    )
    of_fresh, fresh_weight = attend(
        query[None], fresh[0, None], fresh[1, None], is_causal=True, scale=scaling
    )
    # What the logarithms of sums say of past and fresh: their shares.
    share = torch.sigmoid(past_weight.reshape(heads, count) - fresh_weight.reshape(heads, count))
    joined = torch.lerp(of_fresh[0], of_past.reshape(heads, count, size), share[:, :, None])
    return joined.transpose(0, 1)


def _many(segment: Segment, arena: Arena) -> Many:
    used = -(-segment.context // arena.geometry.block_tokens)
    mask: CausalBias | None = None
    if segment.context > segment.count and arena.device.type != "cpu":
        mask = causal_lower_right(segment.count, segment.context)
    return Many(
        start=segment.start,
        count=segment.count,
        context=segment.context,
        table=torch.tensor(segment.table[:used], device=arena.device),
        mask=mask,
    )


def narrowed(kv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In the arena's dtype. What float16 cannot hold becomes the largest that it can, and NaN stays NaN."""
    if dtype is torch.float16 and kv.dtype is not dtype:
        highest = torch.finfo(dtype).max
        kv = kv.clamp(-highest, highest)
    return kv.to(dtype)


def _gather(here: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """One layer's keys and values of a table, contiguous: [2, kv_heads, blocks * block_tokens, head_dim]."""
    kv_heads, head_dim = here.shape[2], here.shape[4]
    return here.permute(1, 2, 0, 3, 4).index_select(2, table).view(2, kv_heads, -1, head_dim)
