"""One layer on a GPU, by this library's forms and by what they are compared with; every method has the same numbers.

`…_sequence` are re-implementations, by ATen calls, of the sequence of operations that another system runs (LoRAFusion,
vLLM); its own kernels are not here, so these columns say what the sequence costs and not what the system does.
"""

import contextlib
import functools
import importlib
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F

import fastlora
from fastlora import backends, lora_linear, lora_routed

from .cases import LinearCase
from .measure import ROTATED_BYTES


@dataclass(frozen=True)
class GpuCase:
    """x (m, k), W (n, k), `adapters` of rank r: one, or those of gates (m, adapters), or each token its own."""

    part: str  # linear, decode, backward, gated, routed
    m: int
    k: int
    n: int
    r: int = 16
    adapters: int = 1
    dtype: str = "bf16"

    @property
    def mode(self):
        return "training" if self.part == "backward" else "forward"

    @property
    def graphs(self):
        """The composed form of a route reads it on the host: without it, among few tokens, all are graphs."""
        return self.part != "routed" or self.m <= 64

    @property
    def name(self):
        several = f"/e{self.adapters}" if self.adapters > 1 else ""
        return f"gpu/{self.part}/{self.k}x{self.n}/{self.dtype}/m{self.m}/r{self.r}{several}"


SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
ROWS = {
    "linear": (1024, 8192),
    "decode": (1, 16, 64),
    "backward": (1024, 8192),
    "gated": (64, 4096),
    "routed": (32, 1024),
}
PARTS = tuple(ROWS)
METHODS = ("base", "fastlora", "fastlora_kernels", "fastlora_triton")
OTHERS = {
    "linear": ("fastlora_triton_tma", "addmm", "peft", "peft_bf16", "compile", "lorafusion_sequence"),
    "decode": ("addmm", "peft", "peft_bf16", "compile", "vllm_sequence"),
    "backward": ("fastlora_triton_tma", "addmm", "peft", "peft_bf16", "compile", "lorafusion_sequence"),
    "gated": ("loop", "compile"),
    "routed": ("loop", "grouped_mm", "vllm_sequence"),
}


def cases(part, tiny=False):
    several = {"gated": 8, "routed": 32}.get(part, 1)
    if tiny:
        return [GpuCase(part, 5, 64, 40, 8, min(several, 3))]
    found = [GpuCase(part, m, k, n, adapters=several) for k, n in SHAPES for m in ROWS[part]]
    return found + [GpuCase(part, ROWS[part][-1], 4096, 4096, 64, several)]


def methods(case):
    ours = [m for m in METHODS if m != "fastlora" or case.part != "routed" or not case.graphs]
    return [*ours, *OTHERS[case.part]]


def calls(case, device, wanted):
    """{method: a call for each copy of the weights}; one that cannot run here is left out, and said."""
    dtype = torch.bfloat16
    torch.manual_seed(0)
    torch._dynamo.reset()
    x = torch.randn(case.m, case.k, device=device, dtype=dtype)
    dy = torch.randn(case.m, case.n, device=device, dtype=dtype)
    size = case.n * case.k * x.element_size()
    copies = min(64, int(ROTATED_BYTES / size) + 1) if device == "cuda" else 1
    found = {method: [] for method in wanted}
    for copy in range(copies):
        w = torch.randn(case.n, case.k, device=device, dtype=dtype) * case.k**-0.5
        A = torch.randn(case.adapters, case.r, case.k, device=device, dtype=dtype) * case.k**-0.5
        B = torch.randn(case.adapters, case.n, case.r, device=device, dtype=dtype) * case.r**-0.5
        choice = torch.arange(case.m, device=device) % case.adapters
        gates = torch.rand(case.m, case.adapters, device=device)
        if case.part == "routed":
            gates = F.one_hot(choice, case.adapters).float()
        for method in list(found):
            try:
                layer, trained = build(method, case, w, A, B, gates, choice)
                if copy == 0:
                    given = gates if case.part in ("gated", "routed") else None
                    wanted_dy = dy if case.mode == "training" else None
                    pinned(method, _check, method, layer, x, w, A, B, given, trained, wanted_dy)
                found[method].append(functools.partial(pinned, method, _call(case, layer, x, dy, trained)))
            except (ImportError, AttributeError, RuntimeError, NotImplementedError) as error:
                skip(case, method, error)
                del found[method]
    return found


def skip(case, method, error):
    print(f"{case.name}: without {method}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)


def pinned(method, call, *args):
    """call(*args), forward and backward, by the form that the method names; a graph keeps what it was captured with."""
    form = method.removeprefix("fastlora") if method.startswith("fastlora") else None
    if form == "_kernels" and backends.cuda_missing():
        raise ImportError(backends.cuda_missing())
    triton = form in ("_triton", "_triton_tma")
    with _triton(form == "_triton_tma") if triton else contextlib.nullcontext():
        if form is None or backends.native()[0] is None:
            return call(*args)
        backends.native()[0].pin_gpu({"": "composed", "_kernels": "kernels"}.get(form, ""))
        try:
            return call(*args)
        finally:
            backends.native()[0].pin_gpu("")


@contextlib.contextmanager
def _triton(tma):
    """Triton's kernels, with its persistent product or without."""
    if tma and torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        raise NotImplementedError("the persistent form is for compute capability 9.0")
    tile = importlib.import_module("fastlora.kernels.tile")
    with backends.use_backend("triton"), mock.patch.object(tile, "FORM", "tma" if tma else ""):
        yield


def _call(case, layer, x, dy, trained):
    if case.mode == "forward":
        return functools.partial(layer, x)
    x = x.detach().requires_grad_()
    return lambda: torch.autograd.grad(layer(x), (x, *trained), dy)


def _check(method, layer, x, w, A, B, gates, trained=(), dy=None):
    """A method that computes something else, or other gradients where there is dy, must not be in the table."""
    with torch.inference_mode(dy is None):
        x = x.detach().requires_grad_(dy is not None)
        x32, *factors = (t.detach().float().requires_grad_(dy is not None) for t in (x, *A, *B))
        factors = [] if method == "base" else factors
        exact = x32 @ w.float().T
        for e, (a, b) in enumerate(zip(factors[: len(A)], factors[len(A) :], strict=True)):
            z = x32 @ a.T
            exact = exact + (z if gates is None else z * gates[:, e : e + 1]) @ b.T
        found, true = [layer(x)], [exact]
        if dy is not None:
            found += torch.autograd.grad(found[0], (x, *trained), dy)
            true += torch.autograd.grad(exact, (x32, *factors), dy.float())
        errors = [((y.float() - e).norm() / e.norm()).item() for y, e in zip(found, true, strict=True)]
    if not all(error < 2e-2 for error in errors):
        said = ", ".join(f"{error:.1e}" for error in errors)
        raise SystemExit(f"{method} is off by {said}: it does not compute the same layer")


def build(method, case, w, A, B, gates, choice):
    """(function of x, the parameters that it trains)"""
    if method == "base":
        return (lambda x: F.linear(x, w)), []
    if method.startswith("fastlora"):
        return _fastlora(case, method, w, A, B, gates, choice)
    if case.part in ("gated", "routed"):
        return _several(method, case.part, w, A, B, gates, choice), []
    if method.endswith("_sequence"):
        a, b = (t[0].detach().requires_grad_(case.mode == "training") for t in (A, B))
        run = _vllm if method == "vllm_sequence" else _LoRAFusion.apply
        return (lambda x: run(x, w, a, b)), [a, b]
    layers = importlib.import_module("benchmarks.layers")
    plain = LinearCase(case.mode, case.m, case.k, case.n, case.dtype, case.r)
    return layers.build(method, plain, w, A[0], B[0])


def _fastlora(case, method, w, A, B, gates, choice):
    A, B = ([t.detach().requires_grad_(case.mode == "training") for t in several] for several in (A, B))
    if case.part == "routed":
        route = fastlora.Route.from_lists([[(int(e), 1.0)] for e in choice], device=w.device)
        pages = in_pages(A, B)

        def run(x):
            return lora_routed(x, w, pages, None, route)
    elif case.part == "gated":
        ranks = [case.r] * case.adapters

        def run(x):
            return lora_linear(x, w, A, B, gates=gates, ranks=ranks)
    else:

        def run(x):
            return lora_linear(x, w, A[0], B[0])

    return run, [*A, *B] if case.mode == "training" else []


def in_pages(A, B):
    """Adapters of one rank, a multiple of 8, in pages."""
    E, r, k = len(A), *A[0].shape
    paged_a = torch.stack(list(A)).view(E * r // 8, 1, 8, k)
    paged_b = torch.stack([b.T for b in B]).view(E * r // 8, 8, -1)
    device, table = A[0].device, torch.arange(E * r // 8, dtype=torch.int32).view(E, r // 8)
    ranks, columns = torch.full((E,), r, dtype=torch.int32), torch.full((E,), -1, dtype=torch.int32)
    host = None if device.type == "cpu" else torch.cat([ranks[:, None], columns[:, None], table], 1)
    there = (t.to(device) for t in (table, ranks, torch.ones(E), columns))
    return fastlora.Pages(paged_a.contiguous(), paged_b.contiguous(), *there, host)


def _several(method, part, w, A, B, gates, choice):
    order = choice.argsort(stable=True)
    ends = torch.bincount(choice, minlength=len(A)).cumsum(0).int()
    rows = [(choice == e).nonzero()[:, 0] for e in range(len(A))]

    def loop(x):
        y = F.linear(x, w)
        for a, b, of in zip(A, B, rows, strict=True):
            y.index_add_(0, of, F.linear(F.linear(x[of], a), b))
        return y

    def grouped_mm(x):
        z = torch._grouped_mm(x[order], A.transpose(1, 2), offs=ends)
        return F.linear(x, w).index_add_(0, order, torch._grouped_mm(z, B.transpose(1, 2), offs=ends))

    def vllm_sequence(x):
        """Each token's A and B gathered: a shrink into a float32 buffer, then an expand added onto y."""
        z = torch.bmm(A[choice], x[:, :, None]).float()
        return F.linear(x, w).add_(torch.bmm(B[choice], z.to(x.dtype))[:, :, 0])

    if part == "gated":
        formula = torch.compile(_gated, dynamic=False) if method == "compile" else _gated
        return lambda x: formula(x, w, A, B, gates)
    return {"loop": loop, "grouped_mm": grouped_mm, "vllm_sequence": vllm_sequence}[method]


def _gated(x, w, A, B, gates):
    y = F.linear(x, w)
    for e in range(len(A)):
        y = y + (F.linear(x, A[e]) * gates[:, e : e + 1].to(x.dtype)) @ B[e].T
    return y


def _vllm(x, w, a, b):
    """Shrink into a float32 buffer, expand onto y in place."""
    y = F.linear(x, w)
    z = torch.mm(x, a.T, out_dtype=torch.float32) if x.is_cuda else torch.mm(x.float(), a.float().T)
    return y.add_(torch.mm(z.to(x.dtype), b.T))


class _LoRAFusion(torch.autograd.Function):
    """z; then base and update into one result; backward: dz and db from dy, dx into one result, da from x."""

    @staticmethod
    def forward(ctx, x, w, a, b):
        z = F.linear(x, a)
        ctx.save_for_backward(x, w, a, b, z)
        return torch.addmm(F.linear(z, b), x, w.T)

    @staticmethod
    def backward(ctx, dy):
        x, w, a, b, z = ctx.saved_tensors
        dz = dy @ b
        return torch.addmm(dz @ a, dy, w), None, dz.T @ x, dy.T @ z
