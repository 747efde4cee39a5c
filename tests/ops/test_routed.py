"""lora_routed against a loop over tokens in float64: values and every gradient, on each back-end."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from exactness import assert_accurate, strided

from fastlora import Pages, Route, lora_routed

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def popularity(kind, tokens, adapters):
    """Each token's slots, in the workloads that the field measures with."""
    torch.manual_seed(1)
    if kind == "distinct":
        return [[t % adapters] for t in range(tokens)]
    if kind == "identical":
        return [[adapters - 1]] * tokens
    if kind == "base":
        return [[]] * tokens
    if kind == "runs":
        return [[t * adapters // tokens] for t in range(tokens)]
    if kind == "lists":
        return [[(t + i) % adapters for i in range(t % 4)] for t in range(tokens)]
    weights = torch.ones(adapters) if kind == "uniform" else 1 / torch.arange(1, adapters + 1) ** 1.5
    drawn = torch.multinomial(weights, tokens, replacement=True).tolist()
    return [[] if t % 5 == 4 else [slot] for t, slot in enumerate(drawn)]


class Case:
    """One call's arguments by name, in float64 but rounded to the dtype under test."""

    def __init__(self, dtype, lists, ranks, inner=40, widths=(52,), bias=True, dora=(), shape=None, masters=False):
        torch.manual_seed(0)
        self.dtype, self.lists, self.ranks = dtype, lists, ranks
        self.slices = widths if len(widths) > 1 else ()
        k, out, E = len(widths), sum(widths), range(len(ranks))
        given = {
            "x": torch.randn(*(shape or (len(lists),)), inner),
            "weight": torch.randn(out, inner) / inner**0.5,
            **{f"A{e}": torch.randn(k * r, inner) / inner**0.5 for e, r in enumerate(ranks)},
            **{f"B{e}": torch.randn(out, r) for e, r in enumerate(ranks)},
            **({"bias": torch.randn(out)} if bias else {}),
            **{f"c{e}": torch.rand(out) + 0.5 for e in dora},
        }
        self.tensors = {name: t.to(dtype).double() for name, t in given.items()}
        self.tensors["gates"] = (torch.rand(sum(map(len, lists))) + 0.5).double()
        self.tensors["scaling"] = torch.rand(len(ranks)).double()
        self.own = {} if dtype == torch.float64 else {"gates": torch.float32, "scaling": torch.float32}
        if masters:
            self.own |= {f"{letter}{e}": torch.float32 for letter in "AB" for e in E}
        offsets = [0, *itertools.accumulate(map(len, lists))]
        self.route = torch.tensor(offsets), [slot for slots in lists for slot in slots]

    def loop(self, t):
        """y token by token, with torch's own autograd, at the dtype of the tensors."""
        rows, gates = [], iter(t["gates"].unbind())
        for token, slots in zip(t["x"].reshape(-1, t["x"].shape[-1]), self.lists, strict=True):
            base = F.linear(token, t["weight"])
            y = base + t["bias"] if "bias" in t else base
            for slot in slots:
                z = (token @ t[f"A{slot}"].T).unflatten(0, (max(len(self.slices), 1), -1))
                parts = t[f"B{slot}"].split(list(self.slices)) if self.slices else (t[f"B{slot}"],)
                update = torch.cat([part @ z[i] for i, part in enumerate(parts)]) * t["scaling"][slot]
                if f"c{slot}" in t:
                    update = (t[f"c{slot}"] - 1) * base + t[f"c{slot}"] * update
                y = y + next(gates) * update
            rows.append(y)
        return torch.stack(rows).view(*t["x"].shape[:-1], len(t["weight"])) if rows else t["x"] @ t["weight"].T

    def plain(self, t):
        """y adapter by adapter for all tokens, with gates of zero: plain torch at the dtype of the tensors."""
        x, tokens = t["x"].reshape(-1, t["x"].shape[-1]), torch.arange(len(self.lists))
        owner = tokens.repeat_interleave(torch.tensor(list(map(len, self.lists)), dtype=torch.int64))
        slots, base = torch.tensor(self.route[1], dtype=torch.int64), F.linear(x, t["weight"])
        y = base + t["bias"] if "bias" in t else base
        for e, r in enumerate(self.ranks):
            mine = slots == e
            gate = torch.zeros(len(x), dtype=x.dtype).index_add(0, owner[mine], t["gates"][mine])
            z, parts = x @ t[f"A{e}"].T, t[f"B{e}"].split(list(self.slices)) if self.slices else (t[f"B{e}"],)
            update = torch.cat([z[:, i * r : (i + 1) * r] @ b.T for i, b in enumerate(parts)], 1) * t["scaling"][e]
            if f"c{e}" in t:
                update = (t[f"c{e}"] - 1) * base + t[f"c{e}"] * update
            y = y + gate[:, None] * update
        return y.view(*t["x"].shape[:-1], len(t["weight"]))

    def ours(self, t, pages=None):
        route = Route(*self.route, t["gates"])
        if pages:
            return lora_routed(t["x"], t["weight"], pages, None, route, t.get("bias"), slices=self.slices)
        E = range(len(self.ranks))
        A, B = [t[f"A{e}"] for e in E], [t[f"B{e}"] for e in E]
        c = [t.get(f"c{e}") for e in E] if any(f"c{e}" in t for e in E) else None
        scaling, bias = t["scaling"], t.get("bias")
        return lora_routed(t["x"], t["weight"], A, B, route, bias, scaling=scaling, column_scale=c, slices=self.slices)

    def at(self, dtype, names, own=False):
        """(tensors at a dtype, or at their own ones, those of the names as leaves that need gradients)"""
        cast = {n: t.to(self.own.get(n, dtype) if own else dtype) for n, t in self.tensors.items()}
        return cast, [cast[n].requires_grad_() for n in names]

    def check(self, pages=None, names=None):
        names = [n for n in self.tensors if n[0] != "c"] if names is None else names
        results = []
        forms = (self.loop, torch.float64, False), (self.plain, self.dtype, False), (self.ours, self.dtype, True)
        for form, dtype, own in forms:
            tensors, leaves = self.at(dtype, names, own)
            y = form(tensors, pages) if own else form(tensors)
            torch.manual_seed(2)
            dy = torch.randn(y.shape).to(self.dtype).to(y.dtype)
            none = dict(allow_unused=True, materialize_grads=True)
            results.append([y.detach(), *(torch.autograd.grad(y, leaves, dy, **none) if y.requires_grad else ())])
        for name, exact, plain, actual in zip(["y", *names], *results, strict=False):
            assert_accurate(actual, exact, plain, name)

    def pages(self):
        """The same adapters in pages, scattered; what no adapter holds is NaN, so that reading it shows."""
        k, dtype, need = max(len(self.slices), 1), self.dtype, [-(-r // 8) for r in self.ranks]
        free = torch.randperm(sum(need) + len(self.ranks) + 3).tolist()
        A = torch.full((len(free), k, 8, self.tensors["x"].shape[-1]), float("nan"), dtype=dtype)
        B = torch.full((len(free), 8, len(self.tensors["weight"])), float("nan"), dtype=dtype)
        table = torch.full((len(need) + 2, max(need)), -1, dtype=torch.int32)
        columns = torch.full((len(need) + 2,), -1, dtype=torch.int32)
        for e, r in enumerate(self.ranks):
            a, b = self.tensors[f"A{e}"].to(dtype), self.tensors[f"B{e}"].to(dtype)
            for i in range(need[e]):
                table[e, i] = page = free.pop()
                rows = slice(8 * i, min(8 * i + 8, r))
                A[page, :, : rows.stop - rows.start] = a.unflatten(0, (k, r))[:, rows]
                B[page, : rows.stop - rows.start] = b[:, rows].T
            if f"c{e}" in self.tensors:
                columns[e] = free.pop()
                B[columns[e], 0] = (self.tensors[f"c{e}"] - 1).to(dtype)
                self.tensors[f"c{e}"] = B[columns[e], 0].double() + 1
        scales = torch.cat([self.tensors["scaling"].float(), torch.zeros(2)])
        return Pages(A, B, table, torch.tensor([*self.ranks, 0, 0], dtype=torch.int32), scales, columns)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["distinct", "uniform", "zipf", "identical", "base", "runs", "lists"])
def test_workloads(backend, kind, dtype):
    Case(dtype, popularity(kind, 29, 5), (4, 1, 17, 8, 3)).check()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("kind", ["distinct", "zipf", "runs", "lists"])
@pytest.mark.parametrize("widths", [(70,), (24, 40), (33, 8, 17)], ids=str)
def test_pages(backend, widths, kind, dtype):
    case = Case(dtype, popularity(kind, 12, 4), (4, 1, 17, 32), inner=65, widths=widths)
    pages = case.pages()
    case.check(pages, ["x", "bias", "gates"])


@pytest.mark.parametrize("adapters, ranks", [(1, 256), (2, 3), (128, 1), (128, 9)])
def test_many(backend, adapters, ranks):
    case = Case(torch.float32, popularity("distinct", 130, adapters), (ranks,) * adapters, inner=33, widths=(40,))
    case.check(case.pages(), ["x", "gates"])
    case.check(names=["x", "A0", "B0"])


@pytest.mark.parametrize("kind", ["zipf", "lists"])
@pytest.mark.parametrize("widths", [(2, 3), (1, 1, 1)], ids=str)
def test_slices(backend, widths, kind):
    Case(torch.float32, popularity(kind, 31, 3), (2, 5, 9), widths=tuple(8 * w for w in widths), bias=False).check()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("in_pages", [False, True])
def test_dora_in_a_mixed_batch(backend, in_pages, dtype):
    case = Case(dtype, popularity("lists", 11, 4), (4, 8, 3, 16), dora=(0, 2))
    pages = case.pages() if in_pages else None
    case.check(pages, ["x", "bias", "gates"] if in_pages else None)


@pytest.mark.parametrize("shape", [(2, 6), (3, 2, 2), (12,)])
def test_tokens_are_the_leading_dimensions(backend, shape):
    Case(torch.float32, popularity("zipf", 12, 3), (4, 2, 8), shape=shape, masters=True).check()


def test_float32_masters_of_a_bfloat16_base(backend):
    Case(torch.bfloat16, popularity("runs", 12, 3), (4, 2, 8), masters=True).check()


def test_strides_and_empty_batches(backend):
    case = Case(torch.float32, popularity("zipf", 12, 3), (4, 2, 8))
    tensors, _ = case.at(torch.float32, [])
    expected = case.ours(tensors)
    odd = {n: t if n in ("gates", "scaling") else strided(t) for n, t in tensors.items()}
    torch.testing.assert_close(case.ours(odd), expected)
    empty = Case(torch.float32, [], (4,), shape=(0, 3))
    empty.check()


def test_pairs_beside_pages(backend):
    """Slots from S on are the pairs': one batch trains an adapter while others are served."""
    case = Case(torch.float32, popularity("lists", 15, 4), (4, 8, 3, 5))
    pages, t = case.pages(), case.at(torch.float32, [])[0]
    S = pages.table.shape[0]
    a, b = t["A3"].clone().requires_grad_(), t["B3"].clone().requires_grad_()
    route = Route(case.route[0], [S if slot == 3 else slot for slot in case.route[1]], t["gates"])
    y = lora_routed(t["x"], t["weight"], [a], [b], route, t["bias"], scaling=t["scaling"][3], pages=pages)
    same, leaves = case.at(torch.float32, ["A3", "B3"])
    expected = case.loop(same)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(
        torch.autograd.grad(y.sum(), (a, b)), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_slot_twice_before_a_gap(backend):
    """The tokens 0, 0, 2 are no piece of x, though as many as from 0 to 2."""
    torch.manual_seed(0)
    x, weight, A, B = (torch.randn(shape) for shape in ((3, 40), (52, 40), (4, 40), (52, 4)))
    leaves = A.requires_grad_(), B.requires_grad_()
    y = lora_routed(x, weight, [A], [B], Route.from_lists([[(0, 0.5), (0, 0.5)], [], [(0, 1.0)]]))
    expected = x @ weight.T + torch.tensor([1.0, 0.0, 1.0])[:, None] * (x @ A.T @ B.T)
    for ours, theirs in zip(*(torch.autograd.grad(f.sum(), leaves) for f in (y, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_no_columns(backend):
    x, A, B = torch.randn(3, 4), torch.randn(2, 4, requires_grad=True), torch.randn(0, 2)
    y = lora_routed(x, torch.randn(0, 4), [A], [B], Route.from_lists([[(0, 1.0)]] * 3))
    assert y.shape == (3, 0) and not torch.autograd.grad(y.sum(), A)[0].any()


def test_gradcheck(backend):
    case = Case(torch.float64, popularity("lists", 5, 3), (2, 3, 1), inner=7, widths=(4, 5))
    names = [n for n in case.tensors if n not in ("gates", "scaling")]
    tensors, leaves = case.at(torch.float64, names)

    def run(*leaves):
        return case.ours({**tensors, **dict(zip(names, leaves, strict=True))})

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_opcheck(backend, dtype):
    case = Case(dtype, popularity("lists", 6, 3), (2, 3, 1), dora=(1,))
    tensors, _ = case.at(dtype, [n for n in case.tensors if n[0] != "c"], own=True)
    route = Route(*case.route, tensors["gates"])
    A, B = ([tensors[f"{letter}{e}"] for e in range(3)] for letter in "AB")
    c = [tensors.get(f"c{e}", torch.empty(0)) for e in range(3)]
    args = (
        tensors["x"],
        tensors["weight"],
        A,
        B,
        tensors["scaling"],
        tensors["bias"],
        route.tensors,
        route.gates,
        c,
        [],
        [],
    )
    ops = torch.ops.fastlora
    torch.library.opcheck(ops.lora_routed.default, args)
    still = [[s.detach() for s in t] if isinstance(t, (list, tuple)) else t.detach() for t in args]
    torch.library.opcheck(ops.lora_routed_forward.default, tuple(still))
    y, z = ops.lora_routed_forward(*still)
    backward = (torch.randn_like(y), *still[:5], *still[6:], z, [True] * 7)
    torch.library.opcheck(ops.lora_routed_backward.default, backward)


def test_compile(backend):
    case = Case(torch.float32, popularity("zipf", 8, 3), (2, 3, 1))
    names = ["x", "A0", "B1"]
    tensors, leaves = case.at(torch.float32, names)
    route = Route(*case.route, tensors["gates"])

    def run(x, A, B):
        return lora_routed(x.relu(), tensors["weight"], A, B, route, scaling=0.5).sin()

    given = tensors["x"], *([tensors[f"{letter}{e}"] for e in range(3)] for letter in "AB")
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = [[y, *torch.autograd.grad(y.sum(), leaves)] for y in (compiled(*given), run(*given))]
    torch.testing.assert_close(*results)


def test_autocast(backend):
    case = Case(torch.float32, popularity("zipf", 8, 3), (2, 3, 1))
    tensors, leaves = case.at(torch.float32, ["x", "A0", "B0"])
    with torch.autocast("cpu", torch.bfloat16):
        y = case.ours(tensors)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


def test_same_batch_same_bits(backend):
    case = Case(torch.float32, popularity("lists", 40, 3), (4, 8, 16), inner=64, widths=(64,))
    tensors, _ = case.at(torch.float32, [])
    assert torch.equal(case.ours(tensors), case.ours(tensors))
