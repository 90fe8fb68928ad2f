"""The vocabulary as one process holds it, whole or a part: what a reduction along it is.

All that a steering step does along the vocabulary is elementwise or one of these reductions. Where the head's
rows are shared out among processes, each reduces its own part and they exchange a few numbers a row; logits
are never gathered. A part's result is the same in all processes to the last bit, so that they decide alike.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import radix_select
from .communicator import Peers

WINDOW = 1024
"""A nucleus is looked for among this many top tokens first, and by a full sort only where it is larger."""
UNIT = float(1 << 40)
"""What a probability of the top token weighs among parts; 2²³ of them still fit 64 bits."""


class Whole:
    """The vocabulary in one piece: torch's own reductions. `first` is the id of the first column."""

    first = 0

    def any(self, flags: Tensor) -> Tensor:
        """Whether a flag [rows] is set in any part."""
        return flags

    def amax(self, rows: Tensor) -> Tensor:
        """The largest entry of each row, [rows]."""
        return rows.amax(-1)

    def argmax(self, rows: Tensor) -> Tensor:
        """The id of the largest entry of each row, [rows] int64; the lowest of several."""
        return rows.argmax(-1)

    def log_softmax(self, rows: Tensor) -> Tensor:
        """Log-probabilities, [rows, columns]."""
        return rows.log_softmax(-1)

    def at(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """The entry of each row at its token, [rows]."""
        return rows.gather(1, tokens[:, None])[:, 0]

    def topk(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` largest entries of each row and their ids, largest first; all where there are fewer."""
        found = rows.topk(min(count, rows.shape[-1]))
        return found.values, found.indices

    def kth_largest(self, rows: Tensor, counts: Tensor) -> Tensor:
        """The entry of each row that `counts` [rows] int64 says, from the largest on, [rows, 1].

        −inf where the count is 0 or no smaller than the row.
        """
        off = (counts == 0) | (counts >= rows.shape[-1])
        wanted = torch.where(off, 1, counts)
        values = rows.topk(int(wanted.max())).values
        return values.gather(-1, wanted[:, None] - 1).masked_fill(off[:, None], -torch.inf)

    def nucleus(self, rows: Tensor, masses: Tensor) -> Tensor:
        """t [rows, 1] such that {s ≥ t} is the smallest set of likeliest tokens with this mass of softmax(s).

        masses [rows] in (0, 1]. The token that crosses its mass belongs to the set; for 1 t is −inf.
        """
        total = rows.logsumexp(-1, keepdim=True)
        size = min(WINDOW, rows.shape[-1])
        values = rows.topk(size).values
        reached = (values - total).exp().double().cumsum(-1)
        wanted = masses[:, None].double()
        if bool(((reached[:, -1:] < wanted) & (wanted < 1)).any()) and size < rows.shape[-1]:
            values = rows.sort(-1, descending=True).values
            reached = (values - total).exp().double().cumsum(-1)
        crossing = (reached < wanted).sum(-1, keepdim=True).clamp(max=reached.shape[-1] - 1)
        return values.gather(-1, crossing).masked_fill(wanted >= 1, -torch.inf)

    def total(self, top: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
        """(top, sums) of the whole from each part's: sums are relative to exp(top); [rows] float64."""
        return top, *sums

    def whole(self, rows: Tensor) -> Tensor:
        """The rows of all parts side by side, [rows, vocab]."""
        return rows


class Shard(Whole):
    """One of several parts: `width` columns from id `first` on, of `vocab` in all."""

    def __init__(self, peers: Peers, first: int, width: int, vocab: int) -> None:
        self.peers, self.first, self.width, self.vocab = peers, first, width, vocab
        self._widest = -(-vocab // peers.size)

    def any(self, flags: Tensor) -> Tensor:
        return self.peers.gather(flags.to(torch.uint8)).amax(0) > 0

    def amax(self, rows: Tensor) -> Tensor:
        return self.peers.gather(rows.amax(-1)).amax(0)

    def argmax(self, rows: Tensor) -> Tensor:
        value, column = rows.max(-1)
        values, ids = self.peers.gather(torch.stack((value.double(), (column + self.first).double()))).unbind(
            1
        )
        return ids.gather(0, values.argmax(0, keepdim=True))[0].long()

    def log_softmax(self, rows: Tensor) -> Tensor:
        top = rows.logsumexp(-1).double()
        top, total = self.total(top, torch.ones_like(top))
        return rows - (top + total.log())[:, None].to(rows.dtype)

    def at(self, rows: Tensor, tokens: Tensor) -> Tensor:
        column = tokens - self.first
        ours = (column >= 0) & (column < self.width)
        found = super().at(rows, column.clamp(0, self.width - 1))
        return self.peers.sum(torch.where(ours, found, 0.0))

    def topk(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        values, columns = super().topk(rows, count)
        missing = min(count, self._widest) - values.shape[-1]
        ours = torch.stack(
            (pad(values.double(), (0, missing), value=-torch.inf), pad(columns + self.first, (0, missing)))
        )
        values, ids = self.peers.gather(ours).permute(1, 2, 0, 3).flatten(-2).unbind()
        values, order = super().topk(values, min(count, self.vocab))
        return values.to(rows.dtype), ids.gather(-1, order).long()

    def kth_largest(self, rows: Tensor, counts: Tensor) -> Tensor:
        off = (counts == 0) | (counts >= self.vocab)
        each, wanted = torch.ones_like(rows, dtype=torch.int64), torch.where(off, 1, counts)
        found = radix_select.largest(rows, each, wanted, self.peers)
        return found[:, None].masked_fill(off[:, None], -torch.inf)

    def nucleus(self, rows: Tensor, masses: Tensor) -> Tensor:
        weights = ((rows - self.amax(rows)[:, None]).exp().double() * UNIT).long()
        total = self.peers.sum(weights.sum(-1))
        found = radix_select.largest(rows, weights, (masses * total).ceil().long().clamp(min=1), self.peers)
        return found[:, None].masked_fill(masses[:, None] >= 1, -torch.inf)

    def total(self, top: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
        tops, *parts = self.peers.gather(torch.stack((top, *sums))).unbind(1)
        highest = tops.amax(0)
        scale = (tops - highest).exp()
        return highest, *((part * scale).sum(0) for part in parts)

    def whole(self, rows: Tensor) -> Tensor:
        """Of parts of different widths: the narrower are filled up, and what fills them is cut away."""
        parts = self.peers.gather(pad(rows, (0, self._widest - self.width)))
        widths = [self.part(rank, self.peers.size, self.vocab) for rank in range(self.peers.size)]
        return torch.cat([part[:, : len(ids)] for part, ids in zip(parts, widths, strict=True)], -1)

    @staticmethod
    def part(rank: int, size: int, vocab: int) -> range:
        """The ids of a rank: sizes differ by one at most."""
        return range(vocab * rank // size, vocab * (rank + 1) // size)


WHOLE = Whole()
