"""The ops on a GPU against float64, by the error rule of the tests: `python -m benchmarks.gpu_check`.

lora_linear with all its gradients and under inference_mode, where few tokens go through the decode kernel, and
lora_shrink under inference_mode, one adapter, with and without dropout; lora_expand into some columns, and of
a table's rows; lora_routed of tokens with several adapters, one or none, with gradients and without. Each composed of
ATen calls and by the CUDA C++ kernels. Neither Triton's kernels nor the gradients of lora_shrink.

With `--device cpu` and FASTLORA_CUDA_LIBRARY naming the emulator's library it runs without a GPU.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch

from fastlora import Route, backends, lora_expand, lora_linear, lora_routed, lora_shrink

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
from exactness import assert_accurate, formula, rounded  # noqa: E402

from .gpu_layers import in_pages, pinned  # noqa: E402

SIZES = ((1, 64, 40, 8), (20, 63, 100, 3), (70, 1100, 136, 16), (300, 512, 264, 65))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device, ran = parser.parse_args(argv).device, 0
    missing = backends.native()[1] or backends.cuda_missing()
    if missing:
        raise SystemExit(missing)
    dtypes, forms = (torch.bfloat16, torch.float16), ("fastlora", "fastlora_kernels")
    for size, dtype, masters, p in itertools.product(SIZES, dtypes, (False, True), (0.0, 0.5)):
        for method in forms:
            ran += _compare(size, dtype, masters, p, device, method)
    for size, dtype, method, op in itertools.product(SIZES, dtypes, forms, (_expand, _embedding, _routed)):
        ours, plain = op(size, dtype, device)
        found, exact, usual = pinned(method, ours), plain(torch.float64), plain(dtype)
        for name, a, e, u in zip(("y", "gradient", "y under inference_mode"), found, exact, usual, strict=True):
            assert_accurate(a, e, u, f"{method} {size} {dtype} {op.__name__}: {name}")
            ran += 1
    same = [pinned("fastlora_kernels", _once, device) for _ in range(3)]
    assert all(torch.equal(same[0], y) for y in same), "three calls do not give the same bits"
    print(f"{ran} comparisons, all accurate")


def _draw(size, dtype, masters, device):
    torch.manual_seed(0)
    m, k, n, r = size
    shapes = dict(x=(m, k), weight=(n, k), lora_A=(r, k), lora_B=(n, r), bias=(n,), gates=(m, r))
    given = {name: torch.randn(shape) for name, shape in shapes.items()}
    for name in ("weight", "lora_A", "lora_B"):
        given[name] /= shapes[name][-1] ** 0.5
    # masters: numbers that the base's type holds exactly, as the error rule rounds them first
    types = {name: torch.float32 if name == "gates" or (masters and "lora" in name) else dtype for name in shapes}
    return {
        name: t.to(torch.float32 if name == "gates" else dtype).to(types[name]).to(device).requires_grad_()
        for name, t in given.items()
    }


def _compare(size, dtype, masters, p, device, method):
    given = _draw(size, dtype, masters, device)
    seed = torch.tensor(1 << 40, device=device) if p else None
    dy = torch.randn(size[0], size[2]).to(dtype).to(device)

    def ours():
        y = lora_linear(**given, dropout_p=p, training=True, seed=seed)
        return [y, *torch.autograd.grad(y, given.values(), dy)]

    def forward(to):
        x, A = (rounded(given[name], given[name].dtype).to(to) for name in ("x", "lora_A"))
        one, scaling = torch.eye(size[3], dtype=to, device=device), torch.ones((), device=device)
        return formula(x, torch.zeros_like(A), [A], [one], scaling, p=p, seed=seed)

    def plain(to):
        t = {name: rounded(v, v.dtype).to(to).requires_grad_() for name, v in given.items()}
        y = formula(t["x"], t["weight"], [t["lora_A"]], [t["lora_B"]], bias=t["bias"], gates=t["gates"], p=p, seed=seed)
        return [y, *torch.autograd.grad(y, t.values(), dy.to(to))]

    found = [*pinned(method, ours), *pinned(method, _inference, given, p, seed)]
    exact, usual = ([*of, of[0], forward(to)] for to in (torch.float64, dtype) for of in [plain(to)])
    names = "y", *given, "y under inference_mode", "z under inference_mode"
    for name, a, e, u in zip(names, found, exact, usual, strict=True):
        assert_accurate(a, e.detach(), u, f"{method} {size} {dtype} p={p}: {name}")
    return len(found)


def _inference(given, p, seed):
    options = dict(dropout_p=p, training=True, seed=seed)
    with torch.inference_mode():
        return lora_linear(**given, **options), lora_shrink(given["x"], given["lora_A"], **options)


def _results(call, given):
    """y, the gradient of what is given, and y without gradients."""
    given = given.detach().requires_grad_()
    y = call(given)
    grad = torch.autograd.grad(y, given, torch.ones_like(y))[0]
    with torch.inference_mode():
        return [y.detach(), grad, call(given.detach())]


def _expand(size, dtype, device):
    """The results for z: a function of nothing, by the op, and one of a type, by plain torch."""
    torch.manual_seed(0)
    m, _, n, r = size
    y, b, z = torch.randn(m, n + 9).to(device, dtype), torch.randn(n, r).to(device, dtype), torch.randn(m, r).to(device)

    def plain(to):
        return _results(lambda z: y.to(to) + torch.nn.functional.pad((z * 0.5) @ b.to(to).T, (9, 0)), z.to(to))

    return lambda: _results(lambda z: lora_expand(y, z, b, 0.5, columns=(9, n + 9)), z), plain


def _embedding(size, dtype, device):
    """The same for lora_A."""
    torch.manual_seed(0)
    m, k, n, r = size
    y, b, a = (
        torch.randn(m, n).to(device, dtype),
        torch.randn(n, r).to(device, dtype),
        torch.randn(r, k).to(device, dtype),
    )
    ids = torch.randint(k, (m,), device=device)

    def plain(to):
        return _results(lambda a: y.to(to) + (a[:, ids].T * 0.5) @ b.to(to).T, a.to(to))

    return lambda: _results(lambda a: lora_expand(y, a.t(), b, 0.5, ids=ids), a), plain


def _routed(size, dtype, device):
    """The same for x of tokens that have some of five adapters each."""
    torch.manual_seed(0)
    m, k, n, r = size
    r, gates = -(-r // 8) * 8, torch.zeros(m, 5)
    shapes = dict(x=(m, k), weight=(n, k), lora_A=(5, r, k), lora_B=(5, n, r), bias=(n,))
    given = {name: (torch.randn(shape) / shape[-1] ** 0.5).to(device, dtype) for name, shape in shapes.items()}
    lists = [[((t + i) % 5, 0.5 + i) for i in range((t + 1) % 4)] for t in range(m)]
    for token, entries in enumerate(lists):
        for slot, gate in entries:
            gates[token, slot] = gate
    route, pages = Route.from_lists(lists, device), in_pages(given["lora_A"], given["lora_B"])

    def plain(to):
        x, weight, A, B, bias = (t.to(to) for t in given.values())
        more = dict(bias=bias, gates=gates.to(device, to), ranks=[r] * 5)
        return _results(lambda x: formula(x, weight, [*A], [*B], **more), x)

    def ours():
        return _results(lambda x: lora_routed(x, given["weight"], pages, None, route, given["bias"]), given["x"])

    return ours, plain


def _once(device):
    given = _draw((70, 1100, 136, 16), torch.bfloat16, False, device)
    return lora_linear(**given).detach()


if __name__ == "__main__":
    main()
