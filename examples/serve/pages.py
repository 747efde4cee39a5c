"""What one layer's tokens can be given: pages of frozen adapters, and pairs of those that are trained."""

import torch

from fastlora.nn.convert import dense_weight
from fastlora.ops import Pages

ROWS = 8


def pages_for(rank, dora):
    """How many pages an adapter takes on a layer; DoRA's c has one of its own."""
    return -(-rank // ROWS) + dora


def pages_of(pair):
    """The same for a Pair."""
    return pages_for(len(pair.lora_A), pair.column is not None)


class Arena:
    """A layer's pages, allocated once, and its tables, rewritten in place: what runs keeps its addresses."""

    def __init__(self, module, pages, slots, max_rank, dtype):
        self.module = module
        (out, inner), device = dense_weight(module).shape, module.weight.device
        self.free = list(range(pages))
        A = torch.zeros(pages, 1, ROWS, inner, dtype=dtype, device=device)
        B = torch.zeros(pages, ROWS, out, dtype=dtype, device=device)
        # ranks, columns and pages, as `Pages.host` has them
        self.host = torch.zeros(slots, 2 + max_rank // ROWS, dtype=torch.int32)
        self.host[:, 1] = -1
        tables = self.host[:, 2:].contiguous(), self.host[:, 0].contiguous(), self.host[:, 1].contiguous()
        table, ranks, columns = (t.to(device) for t in tables)
        scales = torch.zeros(slots, device=device)
        on_host = A.device.type == "cpu"
        self.pages = Pages(A, B, table, ranks, scales, columns, None if on_host else self.host)
        self.tensors = [t for t in self.pages if t is not None]
        self.page_bytes = A[0].nbytes + B[0].nbytes
        # lora_A, lora_B and scaling of the pairs, replaced at once: forwards of other threads read them
        self.own = (), (), torch.ones(0, device=device)
        self._none, self._narrowed = (A.new_empty(0, inner), A.new_empty(out, 0)), (None, None, None)

    def set_pair(self, e, adapter):
        """Make pair e this TaskAdapter's, or one of rank 0 (None)."""
        a, b = (adapter.lora_A, adapter.lora_B) if adapter else self._none
        device = self.module.weight.device
        scale = adapter.scaling.to(device) if adapter else torch.ones((), device=device)
        A, B, scales = self.own
        scales = torch.cat([scales[:e], scale.view(1), scales[e + 1 :]])
        self.own = (*A[:e], a, *A[e + 1 :]), (*B[:e], b, *B[e + 1 :]), scales
        self._narrowed = None, None, None

    def own_of(self, used):
        """`own`, with a pair of rank 0, so a gradient of None, for those not in the frozenset `used`: once a batch."""
        own, narrowed = self.own, self._narrowed
        if len(used) == len(own[0]):
            return own
        if narrowed[0] is not own or narrowed[1] != used:
            (A, B, scales), (a, b) = own, self._none
            A = tuple(t if e in used else a for e, t in enumerate(A))
            B = tuple(t if e in used else b for e, t in enumerate(B))
            self._narrowed = narrowed = own, used, (A, B, scales)
        return narrowed[2]

    def write(self, slot, lora_A, lora_B, scale, column):
        """Give a slot an adapter: lora_A (r, in), lora_B (out, r), DoRA's c − 1 (out) or None."""
        A, B, table, ranks, scales, columns, _ = self.pages
        r = len(lora_A)
        self.free.sort()
        count = pages_for(r, column is not None)
        mine, self.free = self.free[:count], self.free[count:]
        row = self.host[slot]
        row[0], row[1] = r, -1
        if column is not None:
            row[1] = mine.pop()
            B[row[1], 0].copy_(column, non_blocking=True)
        row[2 : 2 + len(mine)] = torch.tensor(mine, dtype=torch.int32)
        for i, page in enumerate(mine):
            rows = slice(ROWS * i, min(ROWS * (i + 1), r))
            n = rows.stop - rows.start
            A[page, 0, :n].copy_(lora_A[rows], non_blocking=True)
            A[page, 0, n:].zero_()
            B[page, :n].copy_(lora_B.T[rows], non_blocking=True)
            B[page, n:].zero_()
        self._publish(slot, scale)

    def clear(self, slot):
        """Take a slot's pages back."""
        r, column, *table = self.host[slot].tolist()
        self.free += table[: pages_for(r, False)] + ([column] if column >= 0 else [])
        self.host[slot, 0], self.host[slot, 1] = 0, -1
        self._publish(slot, 0.0)

    def _publish(self, slot, scale):
        _, _, table, ranks, scales, columns, _ = self.pages
        ranks[slot], columns[slot], scales[slot] = *self.host[slot, :2].tolist(), scale
        table[slot].copy_(self.host[slot, 2:])
