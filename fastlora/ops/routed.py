"""y[t] = x[t] Wᵀ + bias + Σ gate ((c − 1) ⊙ x[t] Wᵀ + c ⊙ s (x[t] lora_Aᵀ) lora_Bᵀ) over the adapters of token t.

Backward, for each adapter of a token, with z = x lora_Aᵀ, e = c ⊙ dy, t = e lora_B and dz = gate · s · t:

    dx = (dy ⊙ (1 + Σ gate (c − 1))) W + Σ dz lora_A        dA = dzᵀ x        dB = gate · s · eᵀ z
    dgate = s Σ t ⊙ z + Σ dy ⊙ (c − 1) ⊙ x Wᵀ               ds = gate Σ t ⊙ z
"""

import torch
import torch.nn.functional as F

from fastlora.ops import check
from fastlora.ops.dropout import wide
from fastlora.ops.library import differentiable, scalar
from fastlora.ops.route import Pages, Route
from fastlora.ops.shrink import flat


def lora_routed(
    x, weight, lora_A, lora_B, route, bias=None, *, scaling=1.0, column_scale=None, slices=None, pages=None
):
    """A linear layer in which every token has adapters of its own, of any rank, each with a gate, in one call.

    y[t] = x[t] Wᵀ + bias + Σ gate ((c − 1) ⊙ x[t] Wᵀ + c ⊙ s (x[t] lora_Aᵀ) lora_Bᵀ) over route's list of token t.
    x (..., in), weight (out, in), bias (out,); lora_A (r, in) and lora_B (out, r): sequences, one pair an adapter.
    `pages` (`Pages`, also in lora_A's place) holds frozen adapters: slots below its S are theirs, slot S + e is pair
    e. s: `scaling`, a number, 0-d or (E,), for the pairs; pages have their own. c: DoRA's, `column_scale`, a sequence
    of (out,) or None, constants. `slices`: k widths that sum to out, as of q, k and v: lora_A is then (k·r, in), and
    slice i of the columns expands the i-th r of its rows. Returns y (..., out) in x's dtype; sums are in float32.

    Differentiable in x, lora_A, lora_B, route.gates, scaling, bias, and weight if it requires grad; double backward
    raises. Errors: ValueError and TypeError that name the argument; RuntimeError under CUDA graph capture, where the
    composed form would freeze this batch's lists. Sources: Punica (Chen et al. 2023, arXiv 2310.18547), S-LoRA (Sheng
    et al. 2023, arXiv 2311.03285); with gates of tokens X-LoRA (Buehler & Buehler 2024, arXiv 2402.07148).
    """
    if isinstance(lora_A, Pages):
        lora_A, lora_B, pages = (), (), lora_A
    check.kind(isinstance(route, Route), "route", type(route).__name__, "a fastlora.Route")
    check.kind(pages is None or isinstance(pages, Pages), "pages", type(pages).__name__, "fastlora.Pages")
    held = () if pages is None else pages[: 6 if pages.host is None else 7]
    if not all(map(torch.is_tensor, held)):
        name = next(name for name, t in zip(Pages._fields, held, strict=False) if not torch.is_tensor(t))
        check.kind(False, f"pages.{name}", type(getattr(pages, name)).__name__, "a tensor")
    if column_scale is not None:
        column_scale = [x.new_empty(0) if c is None else c for c in column_scale]
    return lora_routed_op(
        x, weight, check.tensors("lora_A", lora_A), check.tensors("lora_B", lora_B), scalar(scaling), bias,
        route.tensors, route.gates, column_scale or (), slices or (),
        held,
    )  # fmt: skip


def _segments(plan):
    """[(first position in order, last, slots)] of the segments that have adapters."""
    G, *rest = plan.tolist()
    starts, bounds, slots = rest[: G + 1], rest[G + 1 : 2 * G + 2], rest[2 * G + 2 :]
    lists = [slots[bounds[i] : bounds[i + 1]] for i in range(G)]
    return [(starts[i], starts[i + 1], lists[i]) for i in range(G) if lists[i]]


def _rank_rows(lora_B, pages):
    return max([b.shape[1] for b in lora_B] + ([8 * pages[2].shape[1]] if pages else [0]))


def _paged(slot, A, B, table, ranks, scales, columns, host=None):
    """(A (k, r, in), B (r, out), scale, c − 1 or None) of a slot in pages."""
    if host is not None:
        ranks, columns, table = host[:, 0], host[:, 1], host[:, 2:]
    r, column = int(ranks[slot]), int(columns[slot])
    page = table[slot, : -(-r // 8)].to(A.device, torch.int64)
    d = B[column, 0] if column >= 0 else None
    return A[page].transpose(0, 1).flatten(1, 2)[:, :r], B[page].flatten(0, 1)[:r], scales[slot], d


def _uses(x, lora_A, lora_B, scaling, route, gates, column_scale, slices, pages):
    """The tokens of each list's adapters, adapter by adapter, and their entries in z and in gates.

    (tokens, entries, gates (m, 1), the pair's number, negative in pages, A (k, r, in), B (r, out), scale, c − 1 or
    None), the last four at x's precision.
    """
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("fastlora: lora_routed: a captured graph would keep this batch's lists; pin 'triton'")
    (offsets, _, order, _, plan), to = route, wide(x)
    S, scales = pages[2].shape[0] if pages else 0, scaling.to(x.device, to).expand(len(lora_A))
    for start, stop, listed in _segments(plan):
        tokens = order[start:stop]
        for j, slot in enumerate(listed):
            e, entries = slot - S, offsets[tokens].long() + j
            if e < 0:
                a, b, scale, d = _paged(slot, *pages)
            else:
                a, b, scale = lora_A[e].unflatten(0, (max(len(slices), 1), lora_B[e].shape[1])), lora_B[e].T, scales[e]
                d = column_scale[e].to(to) - 1 if column_scale and column_scale[e].numel() else None
            a, b = a.to(x.dtype).to(to), b.to(x.dtype).to(to)
            yield tokens, entries, gates[entries, None].to(to), e, a, b, scale.to(to), None if d is None else d.to(to)


def lora_routed_forward_reference(x, weight, lora_A, lora_B, scaling, bias, route, gates, column_scale, slices, pages):
    x2, widths = flat(x), list(slices) or [len(weight)]
    z = x2.new_zeros(len(gates), len(widths), _rank_rows(lora_B, pages), dtype=wide(x))
    v = F.linear(x2, weight).to(z.dtype)
    y = v.clone() if bias is None else v + bias.to(v.dtype)
    uses = _uses(x, lora_A, lora_B, scaling, route, gates, column_scale, slices, pages)
    for tokens, entries, gate, _, a, b, scale, d in uses:
        zs = torch.einsum("mi,kri->mkr", x2[tokens].to(z.dtype), a)
        z[entries, :, : zs.shape[2]] = zs
        update = scale * torch.cat([zs[:, i] @ part for i, part in enumerate(b.split(widths, 1))], 1)
        if d is not None:
            update = d * v[tokens] + (1 + d) * update
        y[tokens] += gate * update
    return y.to(x.dtype).view(*x.shape[:-1], len(weight)), z.flatten(1)


def lora_routed_backward_reference(
    dy, x, weight, lora_A, lora_B, scaling, route, gates, column_scale, slices, pages, z, needs
):
    need_x, need_weight, need_A, need_B, need_scaling, need_bias, need_gates = needs
    x2, dy2, widths = flat(x), flat(dy).to(z.dtype), list(slices) or [len(weight)]
    z, wide_x = z.unflatten(1, (len(widths), z.shape[1] // len(widths))), x2.to(z.dtype)
    dv, dx = dy2.clone(), torch.zeros_like(wide_x)
    dA, dB = [torch.zeros_like(a, dtype=z.dtype) for a in lora_A], [torch.zeros_like(b, dtype=z.dtype) for b in lora_B]
    dgates, dscale = torch.zeros_like(gates, dtype=z.dtype), dx.new_zeros(len(lora_A))
    uses = _uses(x, lora_A, lora_B, scaling, route, gates, column_scale, slices, pages)
    for tokens, entries, gate, own, a, b, scale, d in uses:
        e, zs = dy2[tokens], z[entries][:, :, : len(b)]
        if d is not None:
            v = F.linear(x2[tokens], weight).to(z.dtype)
            dgates[entries] += (e * d * v).sum(1)
            dv[tokens] += gate * d * e
            e = e * (1 + d)
        es = e.split(widths, 1)
        t = torch.stack([ei @ bi.T for ei, bi in zip(es, b.split(widths, 1), strict=True)], 1)
        dgates[entries] += scale * (t * zs).sum((1, 2))
        dz = gate[:, None] * scale * t
        dx[tokens] += torch.einsum("mkr,kri->mi", dz, a)
        if own >= 0:
            dA[own] += torch.einsum("mkr,mi->kri", dz, wide_x[tokens]).flatten(0, 1)
            zg = gate[:, None] * scale * zs
            dB[own] += torch.cat([ei.T @ zg[:, i] for i, ei in enumerate(es)])
            dscale[own] += (gate[:, None] * t * zs).sum()
    return (
        (dx + (dv.to(x.dtype) @ weight).to(z.dtype)).to(x.dtype).view_as(x) if need_x else x.new_empty(0),
        (dv.T @ wide_x).to(weight.dtype) if need_weight else x.new_empty(0),
        [g.to(a.dtype) for g, a in zip(dA, lora_A, strict=True)] if need_A else [],
        [g.to(b.dtype) for g, b in zip(dB, lora_B, strict=True)] if need_B else [],
        dscale.sum_to_size(scaling.shape).to(scaling) if need_scaling else x.new_empty(0),
        dy2.sum(0).to(x.dtype) if need_bias else x.new_empty(0),
        dgates.to(gates.dtype) if need_gates else x.new_empty(0),
    )


def _check(x, weight, lora_A, lora_B, scaling, bias, route, gates, column_scale, slices, pages):
    check.base(x, weight, bias)
    k, (out, n_in), tokens = max(len(slices), 1), weight.shape, route[2].shape[0]
    whole = not slices or min(slices) >= 0 and sum(slices) == out
    check.value(whole, "slices", list(slices), f"widths that sum to {out}")
    check.value(len(lora_A) == len(lora_B), "lora_B", f"{len(lora_B)} tensors", f"{len(lora_A)}, as lora_A")
    for a, b in zip(lora_A, lora_B, strict=True):
        check.adapter("lora_B", b, out, None, x)
        check.adapter("lora_A", a, k * b.shape[1], n_in, x)
    check.value(tokens == flat(x).shape[0], "route", f"a route of {tokens} tokens", f"one of {len(flat(x))}, as x has")
    got, expected = f"{tuple(gates.shape)} gates", f"{tuple(route[1].shape)}, as slots"
    check.value(gates.shape == route[1].shape, "route", got, expected)
    check.value(gates.device == x.device, "route", f"a route on {gates.device}", f"{x.device}, as x")
    check.scale(scaling, len(lora_A))
    check.value(len(column_scale) in (0, len(lora_A)), "column_scale", len(column_scale), f"{len(lora_A)}, as lora_A")
    for c in column_scale:
        check.value(tuple(c.shape) in ((out,), (0,)), "column_scale", f"shape {tuple(c.shape)}", f"({out},)")
    if type(route[4]) is torch.Tensor:
        # no fake one: it has numbers
        most = max((slot for _, _, slots in _segments(route[4]) for slot in slots), default=-1)
        slots = len(lora_A) + (pages[2].shape[0] if pages else 0)
        check.value(most < slots, "route", f"slot {most}", f"slots below {slots}")
    if pages:
        A, B = pages[:2]
        fits = A.dim() == 4 and A.shape[1:] == (k, 8, n_in) and B.shape == (A.shape[0], 8, out)
        check.value(fits, "pages", f"A {tuple(A.shape)} and B {tuple(B.shape)}", f"(P, {k}, 8, in) and (P, 8, out)")
        check.value(x.device == A.device == B.device, "pages", f"{A.device} and {B.device}", f"{x.device}, as x")
        check.value(pages[2].dim() == 2, "pages.table", f"shape {tuple(pages[2].shape)}", "(slots, most pages)")
        for name, t in zip(Pages._fields[2:6], pages[2:6], strict=True):
            slots = pages[2].shape[: 2 if name == "table" else 1]
            check.tensor(f"pages.{name}", t, x, slots, torch.float32 if name == "scales" else torch.int32)
            check.value(t.is_contiguous(), f"pages.{name}", f"strides {t.stride()}", "a contiguous tensor")


def _fake(x, weight, lora_A, lora_B, scaling, bias, route, gates, column_scale, slices, pages):
    rows = max(len(slices), 1) * _rank_rows(lora_B, pages)
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((gates.shape[0], rows), dtype=wide(x))


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor[] lora_A, Tensor[] lora_B, Tensor scaling, Tensor? bias, Tensor[] route, "
    "Tensor gates, Tensor[] column_scale, int[] slices, Tensor[] pages"
)
lora_routed_op = differentiable(
    "lora_routed", _ARGUMENTS, (0, 1, 2, 3, 4, 5, 7), _check, _fake,
    (lora_routed_forward_reference, lora_routed_backward_reference), apart=5, kept=("z",),
)  # fmt: skip
