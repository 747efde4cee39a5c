"""lora_routed_forward of the Triton back-end against a loop over tokens in float64."""

from types import SimpleNamespace

import harness
import pytest
import torch
from exactness import assert_accurate, poison

import fastlora
from fastlora.kernels import routed, tile

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
RANKS = (8, 3, 16, 0, 40, 1)
CASES = {
    "a token each": dict(lists=[[(0, 1.0)], [], [(4, 0.5)], [(1, 2.0)], [(2, 1.0)]]),
    "one token": dict(lists=[[(4, 1.0)]], K=264),
    "compositions": dict(lists=[[(0, 0.5), (4, 0.5)], [(4, 0.1), (0, -1.0)], [], [(2, 0.3), (2, 0.4), (1, 1.0)]] * 2),
    "rows": dict(lists=[[(0, 1.0)]] * 19 + [[]] * 3 + [[(4, 0.7), (2, 0.2)]] * 5, K=600),
    "odd": dict(lists=[[(i % 6, 1.0)] for i in range(21)], K=267, N=53, bias=True),
    "slices": dict(lists=[[(i % 5, 0.9)] for i in range(20)], N=150, slices=(70, 16, 64)),
    "slices of few": dict(lists=[[(1, 1.0)], [(2, 1.0)]], N=40, slices=(8, 32), dora=(1, 2)),
    "an empty slice": dict(lists=[[(1, 1.0)], [(2, 1.0)]], N=40, slices=(0, 40)),
    "DoRA": dict(lists=[[(0, 1.0)], [(1, 0.5), (2, 0.5)], [], [(4, 1.0)]] * 5, dora=(1, 2), bias=True),
    "DoRA of few": dict(lists=[[(1, 0.5), (2, 0.7)], [(0, 1.0)]], dora=(1, 2), bias=True),
    "an empty slot": dict(lists=[[(3, 1.0)], [(3, 1.0), (0, 1.0)]] * 9),
    "base only": dict(lists=[[]] * 4, bias=True),
    "no token": dict(lists=[]),
}


def problem(lists, K=40, N=72, slices=(), dora=(), bias=False, dtype=torch.float32, ranks=RANKS):
    """Pages in a shuffled arena whose other pages, and rows beyond a rank, are NaN: none may be read."""
    rng = torch.Generator().manual_seed(len(lists))

    def draw(*shape, by=1.0):
        return (torch.randn(shape, generator=rng) * by).to(dtype)

    k, most = max(len(slices), 1), -(-max(ranks) // 8)
    free = torch.randperm(2 * len(ranks) * most, generator=rng).tolist()
    A, B = (torch.full((len(free), *shape), torch.nan, dtype=dtype) for shape in ((k, 8, K), (8, N)))
    table, columns = (torch.full((len(ranks), *shape), -1, dtype=torch.int32) for shape in ((most,), ()))
    pairs = []
    for slot, r in enumerate(ranks):
        pairs.append((draw(k, r, K, by=K**-0.5), draw(r, N, by=0.5), None))
        for row in range(r):
            if row % 8 == 0:
                table[slot, row // 8] = free.pop()
            page = table[slot, row // 8]
            A[page, :, row % 8], B[page, row % 8] = pairs[-1][0][:, row], pairs[-1][1][row]
        if slot in dora:
            columns[slot], d = free.pop(), draw(N, by=0.1)
            B[columns[slot], 0], pairs[-1] = d, (*pairs[-1][:2], d)
    scales, ranks = torch.rand(len(ranks), generator=rng) + 0.5, torch.tensor(ranks, dtype=torch.int32)
    return SimpleNamespace(
        x=draw(len(lists), K), weight=draw(N, K, by=K**-0.5), bias=draw(N) if bias else None, slices=slices,
        pages=fastlora.Pages(A, B, table, ranks, scales, columns), pairs=pairs,
        route=fastlora.Route.from_lists(lists), lists=lists,
    )  # fmt: skip


def by_torch(c, to):
    """(y, [z of each entry]) by a loop over tokens in one type."""
    v, zs = c.x.to(to) @ c.weight.to(to).t(), []
    y = v if c.bias is None else v + c.bias.to(to)
    y = y.clone()
    for t, entries in enumerate(c.lists):
        for slot, gate in entries:
            a, b, d = (None if part is None else part.to(to) for part in c.pairs[slot])
            zs.append(torch.einsum("i,kri->kr", c.x[t].to(to), a))
            parts = b.split(list(c.slices), 1) if c.slices else (b,)
            update = c.pages.scales[slot].to(to) * torch.cat([z @ part for z, part in zip(zs[-1], parts, strict=True)])
            update = update if d is None else d * v[t] + (1 + d) * update
            y[t] += torch.tensor(gate, dtype=torch.float32).to(to) * update
    return y, zs


def arguments_of(c):
    route, pages = [*map(harness.to_device, c.route.tensors[:4]), c.route.plan], [*map(harness.to_device, c.pages[:6])]
    x, weight, bias, gates = map(harness.to_device, (c.x, c.weight, c.bias, c.route.gates))
    return [x, weight, [], [], torch.tensor(1.0), bias, route, gates, [], c.slices, pages]


def launch(c):
    arguments = arguments_of(c)
    assert routed.lora_routed_forward_objection(*arguments) is None
    with poison():
        return routed.lora_routed_forward(*arguments)


@pytest.mark.parametrize("few", [0, 1 << 20])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_routed(case, dtype, few, monkeypatch):
    """By two launches, and by one however many tokens there are."""
    monkeypatch.setattr(routed, "FEW", few)
    c = problem(**CASES[case], dtype=dtype)
    y, z = launch(c)
    (exact, exact_z), (plain, plain_z) = by_torch(c, torch.float64), by_torch(c, dtype)
    assert y.dtype == dtype and z.dtype == torch.float32
    assert_accurate(y.cpu(), exact, plain, "y")
    z, exact_z, plain_z = (padded(part, c) for part in (z.cpu(), exact_z, plain_z))
    assert_accurate(z, exact_z, plain_z, "z")
    assert not z[exact_z == 0].any()


def padded(z, c):
    """z of every entry (n, k, R), zero beyond a rank."""
    R = 8 * c.pages.table.shape[1]
    if not isinstance(z, torch.Tensor):
        z = [torch.nn.functional.pad(rows, (0, R - rows.shape[1])) for rows in z]
        z = torch.stack(z) if z else c.x.new_empty(0)
    return z.view(len(c.route.slots), max(len(c.slices), 1), R)


BUSY = dict(lists=[[(i % 3, 1.0), (4, 0.5)] for i in range(40)], K=600, slices=(40, 32), dora=(2,), bias=True)


@pytest.mark.skipif(harness.DEVICE != "cpu", reason="a GPU has an order of its own")
def test_any_order_of_programs(monkeypatch):
    """The parts of K arrive in any order: the same bits, and the counters are zero again after every launch."""
    c = problem(**BUSY)
    want = launch(c)
    for seed in range(2):
        order = harness.shuffle_programs(monkeypatch, seed)
        got = launch(c)
        assert len(order) == 2 and torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert not any(counters.any() for counters in tile._counters.values())


def test_only_the_last_adds(monkeypatch):
    """Counters that start one behind: no program is the last, so nobody adds the planes or resets a counter."""
    c = problem(**BUSY)
    tickets = harness.to_device(torch.full((len(c.route.tiles) * 2,), -1, dtype=torch.int32))
    monkeypatch.setattr(tile, "tickets", lambda count, x: tickets)
    _, z = launch(c)
    assert z.isnan().all() and (tickets == tickets[0]).all() and tickets[0] > 0


def test_others_change_nothing():
    """A token's z does not depend on who else is in the batch: K alone says how its sum is cut."""
    c = problem(**BUSY)
    _, z = launch(c)
    some = list(range(17, 40))
    c.x, c.lists, c.route = c.x[some], c.lists[17:], fastlora.Route.from_lists(c.lists[17:])
    torch.testing.assert_close(launch(c)[1], z[34:], rtol=0, atol=0)


def test_padding():
    """A static buffer longer than the batch: empty tiles, slots that no table has, tokens without a list."""
    c = problem(lists=[[(0, 1.0)], [(5, 1.0)], [(1, 2.0), (4, 1.0)]] * 7 + [[]] * 4, bias=True)
    y, z = launch(c)
    base = torch.nn.functional.linear(c.x, c.weight, c.bias)
    assert torch.equal(y[21:].cpu(), base[21:])
    route = c.route
    offsets, slots, order, tiles, plan = route.tensors
    c.route = route = route.with_room(len(slots), len(tiles) + 3)
    padded_y, padded_z = launch(c)
    assert torch.equal(padded_y, y) and torch.equal(padded_z, z)
    route.tensors = offsets, torch.where(slots == 0, -1, slots), order, route.tiles, plan
    c.pages = c.pages._replace(**{name: getattr(c.pages, name)[:5] for name in ("table", "ranks", "scales", "columns")})
    y, z = launch(c)
    unknown = torch.arange(21) % 3 < 2
    assert torch.equal(y[:21][unknown].cpu(), base[:21][unknown]) and not torch.equal(y[2].cpu(), base[2])


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_public(backend):
    """fastlora.lora_routed with the back-end pinned, leading dimensions and strides as they come."""
    c = problem(lists=[[(i % 6, 0.5)] for i in range(20)], K=64, bias=True)
    want = by_torch(c, torch.float64)[0]
    x = harness.to_device(harness.strided(c.x.view(4, 5, 64)))
    pages = fastlora.Pages(*map(harness.to_device, c.pages[:6]))
    route = fastlora.Route.from_lists(c.lists, device=harness.DEVICE)
    with fastlora.use_backend(backend), torch.no_grad():
        weight, bias = harness.to_device(c.weight), harness.to_device(c.bias)
        y = fastlora.lora_routed(x, weight, pages, None, route, bias)
    assert y.shape == (4, 5, 72)
    torch.testing.assert_close(y.cpu().double().view_as(want), want, rtol=1e-5, atol=1e-5)


def test_objections():
    arguments = arguments_of(problem(**CASES["one token"]))
    objection = routed.lora_routed_forward_objection
    own = [arguments[0].new_ones(1, 264)], [arguments[0].new_ones(72, 1)]
    assert "composed" in objection(*arguments[:2], *own, *arguments[4:])
    assert "composed" in objection(*arguments[:10], [])
    pages = arguments[10]
    assert "side by side" in objection(*arguments[:10], [harness.strided(pages[0]), *pages[1:]])
    assert "float64" in objection(arguments[0].double(), *arguments[1:])
