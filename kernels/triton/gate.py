"""g[…, row] = scaling · gates of the row's adapter: as the kernels read it, and its gradients."""

from functools import lru_cache
from typing import NamedTuple

import torch

from .tile import rows_of


class Gate(NamedTuple):
    """g = scale · rows[m·gm + row·gr]; a stride of 0 broadcasts."""

    rows: torch.Tensor | None
    gm: int
    gr: int
    scale: float


NONE = Gate(None, 0, 0, 1.0)


@lru_cache(maxsize=256)
def _owner(ranks, device):
    """The adapter of each rank row."""
    return torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks)).to(device)


def gate(scaling, gates, ranks, z):
    """The gate of z (…, R). A scaling on the host becomes an argument; one on the device is not read by the host."""
    scale, rows = 1.0, gates
    if scaling.dim() == 0 and scaling.device.type == "cpu":
        scale = float(scaling)
    else:
        scaling = scaling.to(z.device, torch.float32)
        rows = scaling if gates is None else scaling * gates.float()
    if rows is None:
        return Gate(None, 0, 0, scale)
    if rows.dim() and rows.shape[-1] > 1 and any(r != 1 for r in ranks):
        rows = rows.index_select(-1, _owner(tuple(ranks), z.device))
    if rows.dim() > 1:
        rows = rows_of(rows.expand(*z.shape[:-1], rows.shape[-1]))
    gr = rows.stride(-1) if rows.dim() and rows.shape[-1] > 1 else 0
    return Gate(rows, rows.stride(0) if rows.dim() > 1 else 0, gr, scale)


def gate_backward(t, z, scaling, gates, ranks, need_scaling, need_gates):
    """(dscaling, dgates) from t = dy bᵀ and z, both before the gate; each in its own shape, type and device."""
    dscaling = dgates = z.new_empty(0)
    if need_scaling or need_gates:
        product = t.view(z.shape) * z.float()
        # the sum over each adapter's rows
        if len(set(ranks)) > 1:
            product = torch.stack([part.sum(-1) for part in product.split(list(ranks), -1)], -1)
        elif any(r != 1 for r in ranks):
            product = product.unflatten(-1, (len(ranks), ranks[0])).sum(-1)
    if need_scaling:
        every = product if gates is None else product * gates
        dscaling = every.sum_to_size(scaling.shape).to(scaling.device, scaling.dtype)
    if need_gates:
        dgates = (product * scaling.to(t.device)).sum_to_size(gates.shape).to(gates.dtype)
    return dscaling, dgates
