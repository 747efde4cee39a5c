"""Routes, and what lora_routed refuses."""

import pytest
import torch

from fastlora import Pages, Route, lora_routed


def test_route():
    route = Route.from_lists([[(0, 0.5)], [], [(2, 1.0), (0, 2.0)], [(0, 3.0)]])
    assert route.offsets.tolist() == [0, 1, 1, 3, 4] and route.slots.tolist() == [0, 2, 0, 0]
    assert route.gates.tolist() == [0.5, 1.0, 2.0, 3.0] and not route.base_only and route.tokens == 4
    assert route.order.tolist() == [0, 3, 1, 2] and route.tiles.tolist() == [[0, 2, 1], [3, 1, 2]]
    rows = Route.from_rows([[(0, 0.5)], [], [(2, 1.0), (0, 2.0)], [(0, 3.0)]], [0, 1, 2, 3])
    for mine, theirs in zip(route.tensors, rows.tensors, strict=True):
        assert torch.equal(mine, theirs)
    taken = route.take([3, 2])
    assert taken.offsets.tolist() == [0, 1, 3] and taken.gates.tolist() == [3.0, 1.0, 2.0]
    with torch.device("meta"):
        some, lone = Route.from_rows([[(0, 0.5)], [(2, 1.0), (0, 2.0)]], [1, -1, 0]), Route([0, 1], [0])
    assert some.offsets.tolist() == [0, 2, 2, 3] and lone.gates.tolist() == [1.0]
    assert all(t.is_cpu for route in (some, lone) for t in (*route.tensors, route.gates))
    assert Route.from_rows([[(1, 1.0)]], [0] * 40 + [-1]).tiles.tolist() == [[0, 16, 1], [16, 16, 1], [32, 8, 1]]
    assert Route.from_lists([[], []]).base_only


def test_a_route_is_rewritten_where_it_lies():
    first = Route.from_lists([[(0, 0.5)], [], [(2, 1.0), (0, 2.0)], [(0, 3.0)]])
    second = Route.from_lists([[(1, 4.0)], [(1, 5.0)], [], []])
    x, weight = torch.randn(4, 6), torch.randn(8, 6)
    A, B = [torch.randn(2, 6) for _ in range(3)], [torch.randn(8, 2) for _ in range(3)]
    room = first.with_room(6, 5)
    places = [t.data_ptr() for t in (*room.tensors[:4], room.gates)]
    for route in (first, second, Route.from_lists([[]] * 4), first):
        assert room.copy_(route) is room and room.base_only == route.base_only
        assert torch.equal(lora_routed(x, weight, A, B, room), lora_routed(x, weight, A, B, route))
        assert room.tiles[len(route.tiles) :].count_nonzero() == 0
    assert places == [t.data_ptr() for t in (*room.tensors[:4], room.gates)]
    before = [t.clone() for t in (*room.tensors, room.gates)]
    for other in (Route.from_lists([[(0, 1.0)] * 7, [], [], []]), Route.from_lists([[(0, 1.0)]])):
        with pytest.raises(ValueError, match="fastlora: other: got .*, expected 4 tokens, 6 entries and 5 tiles"):
            room.copy_(other)
    assert all(map(torch.equal, before, (*room.tensors, room.gates)))


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: Route([0, 2], [1]), "offsets"),
        (lambda: Route([0, 1], [-1]), "slots"),
        (lambda: Route([0, 1], [0.5]), "slots"),
        (lambda: Route([0, 1], [0], [float("nan")]), "gates"),
        (lambda: Route([0, 1], [0], [1.0, 2.0]), "gates"),
        (lambda: Route.from_rows([[(0, 1.0)]], [1]), "rows"),
    ],
)
def test_bad_routes(make, name):
    with pytest.raises(ValueError, match=f"fastlora: {name}"):
        make()


@pytest.mark.parametrize(
    "change, error, name",
    [
        ({"route": Route.from_lists([[(0, 1.0)]] * 3)}, ValueError, "route"),
        ({"route": Route.from_lists([[(2, 1.0)]] * 2)}, ValueError, "route"),
        ({"route": [[0]]}, TypeError, "route"),
        ({"lora_A": [torch.zeros(4, 5)] * 2}, ValueError, "lora_A"),
        ({"lora_B": [torch.zeros(7, 4)] * 2}, ValueError, "lora_B"),
        ({"lora_B": [torch.zeros(8, 4)]}, ValueError, "lora_B"),
        ({"scaling": torch.ones(3)}, ValueError, "scaling"),
        ({"slices": (4, 5)}, ValueError, "slices"),
        ({"column_scale": [torch.ones(3), None]}, ValueError, "column_scale"),
        ({"bias": torch.zeros(3)}, ValueError, "bias"),
        ({"pages": 3}, TypeError, "pages"),
    ],
)
def test_bad_arguments(backend, change, error, name):
    given = dict(x=torch.zeros(2, 6), weight=torch.zeros(8, 6), lora_A=[torch.zeros(4, 6)] * 2,
                 lora_B=[torch.zeros(8, 4)] * 2, route=Route.from_lists([[(0, 1.0)]] * 2))  # fmt: skip
    with pytest.raises(error, match=f"fastlora: {name}"):
        lora_routed(**{**given, **change})


@pytest.mark.parametrize(
    "name, change, error",
    [
        ("table", lambda t: t.long(), TypeError),
        ("table", lambda t: t[0], ValueError),
        ("ranks", lambda t: t.float(), TypeError),
        ("ranks", lambda t: t.repeat(2), ValueError),
        ("ranks", lambda t: t[:, None].repeat(1, 2)[:, 0], ValueError),
        ("scales", lambda t: t.double(), TypeError),
        ("columns", lambda t: t.to("meta"), ValueError),
        ("columns", lambda t: None, TypeError),
    ],
)
def test_bad_tables(backend, name, change, error):
    """Kernels read them as they are said to be."""
    of_slots = torch.full((2,), 8, dtype=torch.int32), torch.ones(2), torch.full((2,), -1, dtype=torch.int32)
    pages = Pages(torch.zeros(2, 1, 8, 6), torch.zeros(2, 8, 8), torch.tensor([[0], [1]], dtype=torch.int32), *of_slots)
    given = torch.zeros(2, 6), torch.zeros(8, 6), pages, None, Route.from_lists([[(0, 1.0)]] * 2)
    assert lora_routed(*given).shape == (2, 8)
    with pytest.raises(error, match=rf"fastlora: pages\.{name}"):
        lora_routed(*given[:2], pages._replace(**{name: change(getattr(pages, name))}), *given[3:])


def test_as_many_gates_as_slots(backend):
    """They may be replaced, by others that require grad."""
    route = Route.from_lists([[(0, 1.0)]] * 2)
    route.gates = torch.ones(1)
    with pytest.raises(ValueError, match="fastlora: route: got .1,. gates, expected .2,., as slots"):
        lora_routed(torch.zeros(2, 6), torch.zeros(8, 6), [torch.zeros(4, 6)], [torch.zeros(8, 4)], route)
