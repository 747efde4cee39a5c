"""A layer's pages: who has which, and that nobody's numbers are in another's."""

import random

import torch
from torch import nn

from fastlora import Route, lora_routed
from fastlora.serve.pages import ROWS, Arena, pages_for

IN, OUT = 24, 40


def arena(pages=12, slots=8):
    torch.manual_seed(0)
    return Arena(nn.Linear(IN, OUT, bias=False).requires_grad_(False), pages, slots, 32, torch.float32)


def adapter(r, dora=False):
    column = torch.randn(OUT) if dora else None
    return torch.randn(r, IN), torch.randn(OUT, r), 0.5, column


def expected(x, weight, A, B, scale, column):
    base, update = x @ weight.T, scale * (x @ A.T @ B.T)
    return base + update if column is None else base + column * base + (1 + column) * update


def run(arena, x, slot):
    route = Route.from_rows([[(slot, 1.0)]], [0] * len(x))
    return lora_routed(x, arena.module.weight, arena.pages, None, route)


def test_pages_for():
    assert [pages_for(r, False) for r in (1, 8, 9, 16, 17)] == [1, 1, 2, 2, 3]
    assert pages_for(8, True) == 2


def test_lowest_pages_first():
    a = arena()
    for slot, r in enumerate((8, 17, 3)):
        a.write(slot, *adapter(r))
    assert a.pages.table[1, :3].tolist() == [1, 2, 3] and a.pages.table[2, 0] == 4
    a.clear(1)
    a.write(3, *adapter(9, dora=True))
    assert a.pages.table[3, :2].tolist() == [1, 2] and a.pages.columns[3] == 3
    assert a.pages.ranks.tolist() == [8, 0, 3, 9, 0, 0, 0, 0]


def test_every_number_that_is_read_was_written():
    """Pages that held NaN, and table rows that held other adapters, show in nothing."""
    a = arena()
    a.pages.A.fill_(float("nan"))
    a.pages.B.fill_(float("nan"))
    for slot in range(3):
        a.write(slot, *adapter(32))
    for slot in range(3):
        a.clear(slot)
    a.pages.A.fill_(float("nan"))
    a.pages.B.fill_(float("nan"))
    given = [adapter(r, dora) for r, dora in ((5, False), (8, True), (12, False), (1, True))]
    for slot, one in enumerate(given):
        a.write(slot, *one)
    x = torch.randn(6, IN)
    for slot, one in enumerate(given):
        torch.testing.assert_close(run(a, x, slot), expected(x, a.module.weight, *one), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(a, x, 7), nn.functional.linear(x, a.module.weight), msg="an empty slot is the base")


def test_coming_and_going():
    """After 200 random steps every page has one owner at most, and every adapter still is what it was."""
    a, rng, held = arena(), random.Random(0), {}
    addresses = [t.data_ptr() for t in a.tensors]
    x = torch.randn(3, IN)
    for _ in range(200):
        slot = rng.randrange(8)
        if slot in held:
            a.clear(slot)
            del held[slot]
        else:
            one = adapter(rng.choice((1, 4, 8, 9, 16, 25)), rng.random() < 0.3)
            if pages_for(len(one[0]), one[3] is not None) <= len(a.free):
                a.write(slot, *one)
                held[slot] = one
        used = sum(pages_for(len(one[0]), one[3] is not None) for one in held.values())
        assert len(set(a.free)) == len(a.free) == 12 - used
        if held:
            slot = rng.choice(sorted(held))
            torch.testing.assert_close(run(a, x, slot), expected(x, a.module.weight, *held[slot]), rtol=1e-4, atol=1e-4)
    assert addresses == [t.data_ptr() for t in a.tensors], "what runs keeps its addresses"
    owned = [p for s in held for p in a.pages.table[s, : -(-int(a.pages.ranks[s]) // ROWS)].tolist()]
    owned += [c for c in a.pages.columns.tolist() if c >= 0]
    assert sorted(owned + a.free) == list(range(12))


def test_pairs_that_are_trained_are_replaced_at_once():
    a = arena()
    a.set_pair(0, None)
    before = a.own
    a.set_pair(1, None)
    assert [len(part) for part in before] == [1, 1, 1] and [len(part) for part in a.own] == [2, 2, 2]
    assert a.own[0][1].shape == (0, IN) and a.own[1][1].shape == (OUT, 0)
