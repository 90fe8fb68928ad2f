"""Reductions along the vocabulary, in one process or sharded over several.

All vocabulary operations of a steering step are elementwise or one of these reductions. With a sharded LM
head, each process reduces its shard and they exchange a few numbers per row; logits are never gathered. All
processes get bitwise equal results, so they choose the same tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import radix_select
from .communicator import Communicator

TOP_P_WINDOW = 1024
"""The nucleus is searched among this many top tokens, and by a full sort only if it is larger."""
MASS_SCALE = float(1 << 40)
"""Integer weight of the top token's probability; 2²³ such tokens still fit in 64 bits."""


class UnshardedVocab:
    """Reductions of an unsharded vocabulary, by torch. `vocab_start` is the id of the first column."""

    vocab_start = 0

    def any(self, flags: Tensor) -> Tensor:
        """Whether a flag [rows] is set in any shard."""
        return flags

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all shards' partial sums [rows]."""
        return x

    def amax(self, x: Tensor) -> Tensor:
        """The largest entry of each row, [rows]."""
        return x.amax(-1)

    def argmax(self, x: Tensor) -> Tensor:
        """The id of the largest entry of each row, [rows] int64; the lowest id of a tie."""
        return x.argmax(-1)

    def log_softmax(self, x: Tensor) -> Tensor:
        """Log-probabilities, [rows, columns]."""
        return x.log_softmax(-1)

    def gather_token(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """Each row's entry at its token id, [rows]."""
        return x.gather(1, token_ids[:, None])[:, 0]

    def topk(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The min(k, vocabulary) largest entries of each row and their ids, largest first."""
        top = x.topk(min(k, x.shape[-1]))
        return top.values, top.indices

    def kth_largest(self, x: Tensor, ks: Tensor) -> Tensor:
        """The k-th largest entry of each row for ks [rows] int64, [rows, 1].

        −inf where k is 0 or at least the vocabulary size.
        """
        disabled = (ks == 0) | (ks >= x.shape[-1])
        clamped_ks = torch.where(disabled, 1, ks)
        values = x.topk(int(clamped_ks.max())).values
        return values.gather(-1, clamped_ks[:, None] - 1).masked_fill(disabled[:, None], -torch.inf)

    def nucleus_threshold(self, x: Tensor, top_p: Tensor) -> Tensor:
        """t [rows, 1] such that {s ≥ t} is the smallest set of likeliest tokens with this mass of softmax(s).

        top_p [rows] in (0, 1]. The token that crosses top_p belongs to the set; t is −inf for top_p 1.
        """
        lse = x.logsumexp(-1, keepdim=True)
        window = min(TOP_P_WINDOW, x.shape[-1])
        values = x.topk(window).values
        cum_probs = (values - lse).exp().double().cumsum(-1)
        target = top_p[:, None].double()
        if bool(((cum_probs[:, -1:] < target) & (target < 1)).any()) and window < x.shape[-1]:
            values = x.sort(-1, descending=True).values
            cum_probs = (values - lse).exp().double().cumsum(-1)
        cutoff = (cum_probs < target).sum(-1, keepdim=True).clamp(max=cum_probs.shape[-1] - 1)
        return values.gather(-1, cutoff).masked_fill(target >= 1, -torch.inf)

    def merge_logsumexp(self, max_logit: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
        """Merge (max, sums) of all shards; sums are relative to exp(max); [rows] float64."""
        return max_logit, *sums

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate the columns of all shards, [rows, vocab]."""
        return x


class VocabShard(UnshardedVocab):
    """Reductions of a sharded vocabulary: this shard has ids [vocab_start, vocab_start + shard_size)."""

    def __init__(self, comm: Communicator, vocab_start: int, shard_size: int, vocab_size: int) -> None:
        self.comm, self.vocab_start, self.shard_size, self.vocab_size = (
            comm,
            vocab_start,
            shard_size,
            vocab_size,
        )
        self._max_shard_size = -(-vocab_size // comm.world_size)

    def any(self, flags: Tensor) -> Tensor:
        return self.comm.all_gather(flags.to(torch.uint8)).amax(0) > 0

    def sum(self, x: Tensor) -> Tensor:
        return self.comm.all_reduce(x)

    def amax(self, x: Tensor) -> Tensor:
        local_max = x.amax(-1) if x.shape[-1] else x.new_full((len(x),), -torch.inf)
        return self.comm.all_gather(local_max).amax(0)

    def argmax(self, x: Tensor) -> Tensor:
        value, column = x.max(-1)
        values, ids = self.comm.all_gather(
            torch.stack((value.double(), (column + self.vocab_start).double()))
        ).unbind(1)
        return ids.gather(0, values.argmax(0, keepdim=True))[0].long()

    def log_softmax(self, x: Tensor) -> Tensor:
        lse = x.logsumexp(-1).double()
        lse, sum_exp = self.merge_logsumexp(lse, torch.ones_like(lse))
        return x - (lse + sum_exp.log())[:, None].to(x.dtype)

    def gather_token(self, x: Tensor, token_ids: Tensor) -> Tensor:
        column = token_ids - self.vocab_start
        is_local = (column >= 0) & (column < self.shard_size)
        entries = super().gather_token(x, column.clamp(0, self.shard_size - 1))
        return self.comm.all_reduce(torch.where(is_local, entries, 0.0))

    def topk(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, columns = super().topk(x, k)
        padding = min(k, self._max_shard_size) - values.shape[-1]
        local = torch.stack(
            (
                pad(values.double(), (0, padding), value=-torch.inf),
                pad(columns + self.vocab_start, (0, padding)),
            )
        )
        values, ids = self.comm.all_gather(local).permute(1, 2, 0, 3).flatten(-2).unbind()
        values, order = super().topk(values, min(k, self.vocab_size))
        return values.to(x.dtype), ids.gather(-1, order).long()

    def kth_largest(self, x: Tensor, ks: Tensor) -> Tensor:
        disabled = (ks == 0) | (ks >= self.vocab_size)
        ones, clamped_ks = torch.ones_like(x, dtype=torch.int64), torch.where(disabled, 1, ks)
        threshold = radix_select.weighted_kth(x, ones, clamped_ks, self.comm)
        return threshold[:, None].masked_fill(disabled[:, None], -torch.inf)

    def nucleus_threshold(self, x: Tensor, top_p: Tensor) -> Tensor:
        weights = ((x - self.amax(x)[:, None]).exp().double() * MASS_SCALE).long()
        total_mass = self.comm.all_reduce(weights.sum(-1))
        threshold = radix_select.weighted_kth(
            x, weights, (top_p * total_mass).ceil().long().clamp(min=1), self.comm
        )
        return threshold[:, None].masked_fill(top_p[:, None] >= 1, -torch.inf)

    def merge_logsumexp(self, max_logit: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
        max_logits, *shard_sums = self.comm.all_gather(torch.stack((max_logit, *sums))).unbind(1)
        global_max = max_logits.amax(0)
        scale = (max_logits - global_max).exp()
        return global_max, *((shard_sum * scale).sum(0) for shard_sum in shard_sums)

    def all_gather(self, x: Tensor) -> Tensor:
        """Shards of different sizes are padded to gather them, and the padding is removed."""
        shards = self.comm.all_gather(pad(x, (0, self._max_shard_size - self.shard_size)))
        id_ranges = [
            self.shard_range(rank, self.comm.world_size, self.vocab_size)
            for rank in range(self.comm.world_size)
        ]
        return torch.cat([shard[:, : len(ids)] for shard, ids in zip(shards, id_ranges, strict=True)], -1)

    @staticmethod
    def shard_range(rank: int, world_size: int, vocab_size: int) -> range:
        """The token ids of a rank's shard; sizes differ by at most one."""
        return range(vocab_size * rank // world_size, vocab_size * (rank + 1) // world_size)


UNSHARDED = UnshardedVocab()
