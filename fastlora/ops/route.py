"""Which adapters each token uses: built once for a batch on the host, read by every layer."""

import copy
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from fastlora.ops import check

TILE = 16


class Route:
    """Token t uses slots[offsets[t]:offsets[t + 1]], each with its gate; an empty list is the base alone.

    offsets (T + 1,), slots (n,), gates (n,), a tensor that may require grad, or None for 1. Tokens are x's leading
    dimensions in row-major order. Tokens that use the same slots make one segment, wherever they are: `order` (T,)
    puts them together, `tiles` (tiles, 3) cuts that into (first position, at most 16 tokens, slots in their list).
    `plan`, on the CPU: G segments, their starts (G + 1), the starts of their lists (G + 1), the lists. All of it is
    on `device` otherwise. With `rows` (R,) the tokens are R, and token t uses list rows[t] of those given instead.
    Raises ValueError for offsets, slots or gates that are no such lists.
    """

    def __init__(self, offsets, slots, gates=None, device=None, rows=None):
        offsets, slots = _integers("offsets", offsets), _integers("slots", slots)
        lengths = np.diff(offsets)
        whole = offsets.size and offsets[0] == 0 and offsets[-1] == slots.size and (lengths >= 0).all()
        check.value(whole, "offsets", offsets.tolist()[:8], f"numbers that rise from 0 to {slots.size}")
        # on the CPU whatever torch's default device is, as what comes from NumPy
        gates = np.ones(len(slots), np.float32) if gates is None else gates
        gates = torch.as_tensor(gates, device=getattr(gates, "device", "cpu"))
        gates = gates if gates.dtype == torch.float64 else gates.float()
        check.value(gates.shape == (len(slots),), "gates", f"shape {tuple(gates.shape)}", f"({len(slots)},), as slots")
        finite = bool(gates.detach().isfinite().all())
        check.value(finite, "gates", "infinity or NaN", "finite numbers")
        bounds, flat, numbers = offsets.tolist(), slots.tolist(), {}
        lists = (tuple(flat[a:b]) for a, b in zip(bounds, bounds[1:], strict=False))
        group = np.array([numbers.setdefault(listed, len(numbers)) for listed in lists], np.int64)
        if rows is not None:
            rows = _integers("rows", rows)
            check.value(not rows.size or rows.max() < len(group), "rows", rows[:8].tolist(), f"rows below {len(group)}")
            group, starts, lengths = group[rows], offsets[:-1][rows], lengths[rows]
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            entries = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
            slots, gates = slots[entries], gates[torch.from_numpy(entries).to(gates.device)]
        counts = np.bincount(group, minlength=len(numbers))
        used = [(listed, count) for listed, count in zip(numbers, counts.tolist(), strict=True) if count]
        starts = [0, *accumulate(count for _, count in used)]
        bounds = [0, *accumulate(len(listed) for listed, _ in used)]
        every = [slot for listed, _ in used for slot in listed]
        self.plan = torch.from_numpy(np.array([len(used), *starts, *bounds, *every]))
        tiles = [
            (start + i, min(TILE, count - i), len(listed))
            for start, (listed, count) in zip(starts, used, strict=False)
            for i in range(0, count, TILE)
            if listed
        ]
        self.base_only = not tiles
        self.offsets = torch.from_numpy(offsets.astype(np.int32)).to(device)
        self.slots, self.gates = torch.from_numpy(slots.astype(np.int32)).to(device), gates.to(device)
        self.order = torch.from_numpy(np.argsort(group, kind="stable")).to(device)
        self.tiles = torch.from_numpy(np.array(tiles, np.int32).reshape(-1, 3)).to(device)
        # how many tokens it is for, and what the op takes beside the gates
        self.tokens, self.tensors = len(group), (self.offsets, self.slots, self.order, self.tiles, self.plan)

    @classmethod
    def from_lists(cls, lists, device=None):
        """The route of tokens whose lists of (slot, gate) are given, as in [[(0, 0.5)], []]."""
        return cls.from_rows(lists, np.arange(len(lists)), device)

    @classmethod
    def from_rows(cls, lists, rows, device=None):
        """The route of tokens each of which uses the list of (slot, gate) of its row; −1 is a token without any."""
        rows = _integers("rows", rows, -1)
        check.value(not rows.size or rows.max() < len(lists), "rows", rows.tolist()[:8], f"rows below {len(lists)}")
        # the last one is that of −1
        rows = np.where(rows < 0, len(lists), rows)
        offsets = [0, *accumulate(map(len, (*lists, ())))]
        flat = [entry for entries in lists for entry in entries]
        gates = torch.from_numpy(np.array([gate for _, gate in flat], np.float32))
        return cls(offsets, [slot for slot, _ in flat], gates, device, rows)

    def take(self, tokens):
        """The route of these tokens alone, in this order."""
        n = int(self.offsets[-1])
        return Route(self.offsets, self.slots[:n], self.gates[:n], self.order.device, _integers("tokens", tokens))

    def with_room(self, entries, tiles):
        """This route in buffers for so many entries and tiles: what a graph that was captured with it reads."""
        room = copy.copy(self)
        room.offsets, room.order = self.offsets.clone(), self.order.clone()
        room.slots, room.gates = self.slots.new_zeros(entries), self.gates.new_zeros(entries)
        room.tiles = self.tiles.new_zeros(tiles, 3)
        return room.copy_(self)

    @torch.no_grad()
    def copy_(self, other):
        """Become `other`, a route of as many tokens, in place; it may have fewer entries and tiles. Returns self.

        Raises ValueError where it does not fit in, before anything changes.
        """
        sizes = [(route.tokens, len(route.slots), len(route.tiles)) for route in (self, other)]
        fits = sizes[0][0] == sizes[1][0] and all(new <= old for old, new in zip(*sizes, strict=True))
        got, room = ("{} tokens, {} entries and {} tiles".format(*size) for size in reversed(sizes))
        check.value(fits, "other", got, f"{room}, or fewer of the last two")
        # a tile of zeros is one without tokens
        self.tiles.zero_()
        for name in ("offsets", "order", "slots", "gates", "tiles"):
            new = getattr(other, name)
            getattr(self, name)[: len(new)].copy_(new, non_blocking=True)
        self.plan, self.base_only = other.plan, other.base_only
        self.tensors = self.offsets, self.slots, self.order, self.tiles, self.plan
        return self


def _integers(name, given, least=0):
    array = np.asarray(given.cpu() if isinstance(given, torch.Tensor) else given)
    if array.ndim != 1 or array.size and array.dtype.kind not in "iu":
        check.value(False, name, f"{array.dtype} of shape {array.shape}", "a sequence of integers")
    array = array.astype(np.int64)
    check.value(not array.size or array.min() >= least, name, array[:8].tolist(), f"integers of at least {least}")
    return array


class Pages(NamedTuple):
    """A layer's frozen adapters, in pages of 8 rank rows; what slot s holds stands in row s of the tables.

    A (P, k, 8, in), for each of k output slices; B (P, 8, out); table (S, most pages) int32, a slot's pages in the
    order of its rank rows; ranks (S,) int32, 0 for none; scales (S,) float32; columns (S,) int32, the page of B whose
    first row is DoRA's c − 1, or −1. `host`, where the device is not the CPU: (S, 2 + most pages) int32 on the CPU
    with ranks, columns and table.
    """

    A: torch.Tensor
    B: torch.Tensor
    table: torch.Tensor
    ranks: torch.Tensor
    scales: torch.Tensor
    columns: torch.Tensor
    host: torch.Tensor | None = None
