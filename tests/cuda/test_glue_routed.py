"""lora_routed through the CUDA kernels, on CPU tensors: the emulator's library is the GPU."""

import pytest
import torch
from test_glue import native, pytestmark  # noqa: F401

from fastlora import Pages, Route, lora_routed

LISTS = [[(0, 0.5), (2, 2.0)], [(1, 1.0)], [], [(2, -1.0), (0, 0.5)], [(3, 1.0), (1, 0.5)]]
RANKS = (8, 3, 17, 0)


def arguments(tokens=20, k=72, widths=(40,), dtype=torch.bfloat16, dora=False, seed=0):
    """(x, weight, bias, pages) of -1, 0 and 1: every sum is exact, in any order. The pages lie in no order."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(-1, 2, shape, generator=rng).to(dtype)

    need = [-(-r // 8) for r in RANKS]
    free = torch.randperm(sum(need) + 3, generator=rng).tolist()
    A, B = draw(len(free), len(widths), 8, k), draw(len(free), 8, sum(widths))
    table = torch.full((len(RANKS), max(need)), -1, dtype=torch.int32)
    for slot, count in enumerate(need):
        table[slot, :count] = torch.tensor([free.pop() for _ in range(count)])
    scales, columns = torch.tensor([0.5, 1.0, 2.0, 1.0]), torch.full((len(RANKS),), -1, dtype=torch.int32)
    if dora:
        columns[2] = free.pop()
    pages = Pages(A, B, table, torch.tensor(RANKS, dtype=torch.int32), scales, columns)
    x = draw(tokens, k)
    if k > 1000:
        # so that no sum goes beyond what bf16 holds exactly
        x *= torch.rand(x.shape, generator=rng) < 0.02
    return x, draw(sum(widths), k), draw(sum(widths)), pages


def routes(tokens, lists=LISTS):
    return Route.from_lists([lists[t % len(lists)] for t in range(tokens)])


def both(emulated, launches, x, w, bias, pages, route, **more):
    """y and the gradients of x and the gates, of the kernels and without them: the same bits."""
    found = []
    for form in ("kernels", "composed"):
        native.pin_gpu(form)
        emulated()
        given, gates = x.detach().requires_grad_(), route.gates.detach().requires_grad_()
        route.gates = gates
        y = lora_routed(given, w, pages, None, route, bias, **more)
        assert emulated() == (launches if form == "kernels" else 0)
        found.append([y.detach(), *torch.autograd.grad(y, [given, gates], torch.ones_like(y), allow_unused=True)])
    native.pin_gpu("kernels")
    for a, b in zip(*found, strict=True):
        assert (a is b is None) or torch.equal(a, b)
    return found[0][0]


CASES = {
    "plain": {},
    "fp16": dict(dtype=torch.float16),
    "one token": dict(tokens=1),
    "slices": dict(widths=(24, 8, 40)),
    "split along K": dict(k=2100),
    "DoRA": dict(dora=True, widths=(24, 40)),
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_two_launches(emulated, options):
    """With gradients z is kept."""
    *given, pages = arguments(**options)
    slices = options.get("widths", ())
    both(emulated, 2, *given, pages, routes(len(given[0])), slices=slices if len(slices) > 1 else None)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_decode(emulated, options):
    """Few tokens without gradients are one launch, base and all."""
    x, w, bias, pages = arguments(**options)
    slices, route = options.get("widths", ()), routes(len(x))
    more = dict(slices=slices if len(slices) > 1 else None)
    with torch.inference_mode():
        y = lora_routed(x, w, pages, None, route, bias, **more)
        assert emulated() == 1
        native.pin_gpu("composed")
        assert torch.equal(y, lora_routed(x, w, pages, None, route, bias, **more))


def test_base_only(emulated):
    x, w, bias, pages = arguments()
    both(emulated, 0, x, w, bias, pages, routes(20, [[]]))


def test_layouts(emulated):
    """Of x, weight and bias any; a route in buffers with room for more."""
    x, w, bias, pages = arguments()
    route = routes(20).with_room(50, 9)
    with torch.inference_mode():
        y = lora_routed(x, w, pages, None, route, bias)
        assert emulated() == 1
        wide = torch.zeros(20, 144, dtype=x.dtype)
        wide[:, ::2] = x
        assert torch.equal(lora_routed(wide[:, ::2], w, pages, None, route, bias), y) and emulated() == 1
        assert torch.equal(lora_routed(x.view(4, 5, 72), w, pages, None, route, bias).flatten(0, 1), y)
        assert emulated() == 1
        assert torch.equal(lora_routed(x, w.t().contiguous().t(), pages, None, route, bias), y)
        assert emulated() == 2, "the base by ATen"


def test_an_empty_arena(emulated):
    """No adapter is loaded: the base alone."""
    x, w, bias, pages = arguments()
    none = torch.zeros(len(RANKS), dtype=torch.int32)
    empty = pages._replace(A=pages.A[:0], B=pages.B[:0], ranks=none)
    both(emulated, 0, x, w, bias, empty, routes(20))


def test_z_does_not_depend_on_the_batch(emulated):
    x, w, bias, pages = arguments(tokens=300, k=2100)
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    found = [routed_forward(x[:m], w, bias, pages, routes(m))[1] for m in (4, 300)]
    assert emulated() == 4
    entries = len(found[0])
    assert torch.equal(found[0], found[1][:entries])


def routed_forward(x, w, bias, pages, route):
    one = torch.ones(())
    given = x, w, [], [], one, bias, route.tensors, route.gates, [], [], [*pages[:6]]
    return torch.ops.fastlora.lora_routed_forward(*given)


def test_many_tokens(emulated):
    x, w, bias, pages = arguments(tokens=130)
    with torch.inference_mode():
        lora_routed(x, w, pages, None, routes(130), bias)
    assert emulated() == 2


def test_what_is_not_taken(emulated):
    """Adapters in tensors of their own, another type, pages whose rows do not lie together."""
    x, w, bias, pages = arguments()
    A, B = torch.zeros(8, 72, dtype=x.dtype), torch.zeros(40, 8, dtype=x.dtype)
    across = pages._replace(A=pages.A.transpose(2, 3).contiguous().transpose(2, 3))
    with torch.inference_mode():
        y = lora_routed(x, w, pages, None, routes(20), bias)
        assert emulated() == 1
        lora_routed(x, w, [A], [B], routes(20, [[(0, 1.0)]]), bias)
        lora_routed(x.float(), w.float(), pages._replace(A=pages.A.float(), B=pages.B.float()), None, routes(20))
        assert torch.equal(lora_routed(x, w, across, None, routes(20), bias), y)
    assert emulated() == 0
