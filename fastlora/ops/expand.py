"""y + (z ⊙ g) lora_Bᵀ, the second half of the update."""

import torch

from fastlora.ops import check
from fastlora.ops.library import differentiable, scalar
from fastlora.ops.shrink import apart, flat, join


def lora_expand(y, z, lora_B, scaling=1.0, *, gates=None, ranks=None, columns=None, ids=None):
    """y with the low-rank update added: y + (z ⊙ g) lora_Bᵀ, to all columns or to columns start:stop.

    y (..., out) is never written; z (..., R) from `lora_shrink`; lora_B (stop − start, R), or a sequence, one per
    adapter. `scaling`, `gates`, `ranks` as in `lora_linear`. With `ids` (...), int64 or int32, z is a table (V, R)
    whose row ids[...] takes z's place: lora_Aᵀ for an embedding, whose x is one-hot. Returns a new tensor of y's
    shape and dtype. Serves layers whose base is no dense matrix: embeddings, convolutions, quantised or opaque
    modules. Raises ValueError or TypeError that names the argument, IndexError for an id beyond the table (where a
    GPU kernel gathers, y stays as it is there). Source: Hu et al. 2021, arXiv 2106.09685.
    """
    B = check.tensors("lora_B", lora_B)
    if ranks is None:
        ranks = [] if isinstance(lora_B, torch.Tensor) else [b.shape[1] for b in B]
    return lora_expand_op(y, z, B, scalar(scaling), gates, ranks, () if columns is None else columns, ids)


def expand_gate(scaling, gates, ranks, device, dtype):
    """g, broadcastable to (..., R): g[..., row] = scaling_e · gates[..., e] for every rank row of adapter e."""
    g = scaling.to(device, dtype)
    if gates is not None:
        g = g * gates.to(dtype)
    if len(ranks) > 1 and g.dim() and g.shape[-1] == len(ranks):
        g = g.repeat_interleave(torch.tensor(ranks, device=g.device), dim=-1, output_size=sum(ranks))
    return g


def add_update(y, z, lora_B, g):
    """y + (z ⊙ g) lora_Bᵀ in z's dtype."""
    for zb, b in zip((z * g).split([b.shape[1] for b in lora_B], -1), lora_B, strict=True):
        y = y + zb @ b.T.to(zb.dtype)
    return y


def lora_expand_reference(y, z, lora_B, scaling, gates, ranks, columns, ids):
    z = (z if ids is None else torch.embedding(z, ids)).to(torch.promote_types(z.dtype, torch.float32))
    g, part = expand_gate(scaling, gates, ranks, y.device, z.dtype), slice(*columns or (None,))
    out = y.clone(memory_format=torch.contiguous_format)
    out[..., part] = add_update(y[..., part].to(z.dtype), z, lora_B, g)
    return out


def lora_expand_backward_reference(dy, z, lora_B, scaling, gates, ranks, columns, ids, needs):
    """With t = dy lora_B: dz = t ⊙ g, dB = dyᵀ (z ⊙ g), dg = t ⊙ z."""
    need_z, need_B, need_scaling, need_gates = needs
    table, z = z, (z if ids is None else torch.embedding(z, ids)).to(torch.promote_types(z.dtype, torch.float32))
    dy = dy[..., slice(*columns or (None,))].to(z.dtype)
    g = expand_gate(scaling, gates, ranks, dy.device, z.dtype)
    t = join([dy @ b.to(dy.dtype) for b in lora_B], dy, dy.dtype)
    dz = (t * g).contiguous() if need_z else z.new_empty(0)
    dB = apart(flat(dy).T @ flat(z * g), lora_B, 1) if need_B else []
    if need_z and ids is not None:
        dz = torch.ops.aten.embedding_dense_backward(dz, ids, len(table), -1, False)
    dg, dscaling, dgates = t * z, z.new_empty(0), z.new_empty(0)
    if ranks:
        dg = torch.stack([rows.sum(-1) for rows in dg.split(list(ranks), -1)], -1)
    if need_scaling:
        every = dg if gates is None else dg * gates.to(dg.dtype)
        dscaling = every.sum_to_size(scaling.shape).to(scaling.device, scaling.dtype)
    if need_gates:
        dgates = (dg * scaling.to(dg.device, dg.dtype)).sum_to_size(gates.shape).to(gates.dtype)
    return dz.to(table.dtype), dB, dscaling, dgates


_ARGUMENTS = (
    "Tensor y, Tensor z, Tensor[] lora_B, Tensor scaling, Tensor? gates, int[] ranks, int[] columns, Tensor? ids"
)
_REFERENCES = lora_expand_reference, lora_expand_backward_reference
lora_expand_op = differentiable(
    "lora_expand", _ARGUMENTS, (1, 2, 3, 4), check.expand, lambda y, *_: y.new_empty(y.shape), _REFERENCES, apart=0
)
