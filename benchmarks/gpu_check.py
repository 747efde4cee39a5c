"""Two ops on a GPU against float64, by the error rule of the tests: `python -m benchmarks.gpu_check`.

lora_linear with all its gradients and under inference_mode, where few tokens go through the decode kernel, and
lora_shrink under inference_mode; each composed of ATen calls and by the CUDA C++ kernels, one adapter, with and without
dropout. Neither Triton's kernels nor lora_expand, lora_routed and the gradients of lora_shrink.

With `--device cpu` and FASTLORA_CUDA_LIBRARY naming the emulator's library it runs without a GPU.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch

from fastlora import backends, lora_linear, lora_shrink

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
from exactness import assert_accurate, formula, rounded  # noqa: E402

from .gpu_layers import pinned  # noqa: E402

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


def _once(device):
    given = _draw((70, 1100, 136, 16), torch.bfloat16, False, device)
    return lora_linear(**given).detach()


if __name__ == "__main__":
    main()
