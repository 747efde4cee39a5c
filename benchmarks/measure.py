"""One case, every method: inputs, a check that all compute the same thing, times, memory, rows."""

import functools

import torch

from . import layers, variants
from .cases import DTYPES, DecodeCase, LayerCase, LinearCase, MixtureCase
from .clock import peak_bytes, time_cpu, time_cuda

# More than any GPU's L2 cache: a weight that is used again has left it.
ROTATED_BYTES = 300e6


def measure(case, device, methods, seconds):
    """The rows of a case, one a method."""
    lists = CALLS[type(case)](case, device, methods)
    copies = len(next(iter(lists.values())))
    calls = {m: functools.partial(_each, of) if copies > 1 else of[0] for m, of in lists.items()}
    with torch.inference_mode(getattr(case, "mode", "forward") != "training"):
        graphs = getattr(case, "graphs", True)
        timing = time_cuda(calls, copies, graphs=graphs) if device == "cuda" else time_cpu(calls, seconds)
        memory = {m: peak_bytes(call, device) for m, call in calls.items()}
    return [_row(case, m, timing, memory[m]) for m in methods if m in calls]


def _each(calls):
    for call in calls:
        call()


def _row(case, method, timing, memory):
    p20, p50, p80 = (s * 1e6 for s in timing.quantiles(method))
    return {
        "case": case.name,
        "method": method,
        "p20_us": p20,
        "p50_us": p50,
        "p80_us": p80,
        **{f"vs_{m}": timing.ratio(method, m) if m in timing.seconds else "" for m in ("base", "fastlora")},
        "peak_mb": memory / 1e6,
        "calls": timing.calls,
        "samples": len(timing.seconds[method]),
        "dropped": timing.dropped[method],
        "runs": 1,
    }


def _linear_calls(case, device, methods):
    """{method: one call for each copy of the weights}; the methods share the weights."""
    dtype = DTYPES[case.dtype]
    x = torch.randn(case.m, case.k, device=device, dtype=dtype)
    dy = torch.randn(case.m, case.n, device=device, dtype=dtype)
    size = case.n * case.k * x.element_size()
    copies = min(64, int(ROTATED_BYTES / size) + 1) if device == "cuda" else 1
    calls = {m: [] for m in methods}
    torch._dynamo.reset()
    for copy in range(copies):
        w = torch.randn(case.n, case.k, device=device, dtype=dtype) * case.k**-0.5
        a = torch.randn(case.r, case.k, device=device) * case.k**-0.5
        b = torch.randn(case.n, case.r, device=device) * case.r**-0.5
        for method in methods:
            layer, trained = layers.build(method, case, w, a, b)
            if copy == 0:
                _check(method, layer, x, w, a, b)
            calls[method].append(_call(case, layer, x, dy, trained))
    return calls


def _call(case, layer, x, dy, trained):
    if case.mode == "forward":
        return functools.partial(layer, x)
    x = x.detach().requires_grad_()
    return lambda: torch.autograd.grad(layer(x), (x, *trained), dy)


def _check(method, layer, x, w, a, b):
    """A method that computes something else must not be in the table."""
    with torch.inference_mode():
        exact = x.float() @ (w.float() + (0 if method == "base" else b @ a)).T
        error = ((layer(x).float() - exact).norm() / exact.norm()).item() if x.numel() else 0.0
    if not error < (2e-2 if x.dtype == torch.bfloat16 else 1e-4):
        raise SystemExit(f"{method} is off by {error:.1e}: it does not compute the same layer")


def _decode_calls(case, device, methods):
    from . import models, steps

    model, tokenizer = models.load(DTYPES[case.dtype])
    model.to(device)
    tokens = torch.randint(10, len(tokenizer), (case.batch, case.past), device=device)
    adapted = {m: steps.randomize(models.adapted(model, m, case.r)) for m in methods}
    return {m: [steps.decode_step(adapted[m], tokens)] for m in methods}


def _mixture_calls(case, device, methods):
    from . import mixtures

    return mixtures.calls(case, device, methods)


# benchmarks/gpu.py adds its own.
CALLS = {
    LinearCase: _linear_calls, DecodeCase: _decode_calls, LayerCase: variants.calls, MixtureCase: _mixture_calls,
}  # fmt: skip
