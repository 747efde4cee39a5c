"""g[..., row] = scaling_e · gates[..., e] for every rank row of adapter e, and its gradient."""

import torch


def expand_gate(scaling, gates, ranks, device, dtype):
    """g, broadcastable to (..., R)."""
    g = scaling.to(device, dtype)
    if gates is not None:
        g = g * gates.to(dtype)
    return _rows(g, ranks)


def _rows(g, ranks):
    if ranks and g.dim() and g.shape[-1] == len(ranks) and len(ranks) > 1:
        repeats = torch.tensor(ranks, device=g.device)
        return g.repeat_interleave(repeats, dim=-1, output_size=sum(ranks))
    return g


def gate_backward(dg, scaling, gates, ranks):
    """(dscaling, dgates) from dg (..., R); dgates is None without gates. Each has its own tensor's shape and dtype."""
    if ranks:
        dg = torch.stack([rows.sum(-1) for rows in dg.split(list(ranks), -1)], -1)
    wide = scaling.to(dg.device, dg.dtype)
    if gates is None:
        return _sum_to(dg, scaling), None
    return _sum_to(dg * gates.to(dg.dtype), scaling), _sum_to(dg * wide, gates)


def _sum_to(grad, like):
    return grad.sum_to_size(like.shape).to(like.device, like.dtype)
