"""Layers that run a composition of their adapters: one for all rows, or one for each of several candidates.

With weights w (P, N) of N adapters, lora_A a_i (r, in) and lora_B b_i (out, r), each of the largest rank, zero beyond
its own, and its lora_alpha / r in b_i:

    lorahub   ΔW_p = (Σ w_pi b_i) (Σ w_pi a_i)        sum   ΔW_p = Σ w_pi b_i a_i

Row j of a batch of P · n rows runs ΔW of candidate j // n.
"""

import contextlib
import math

import torch
import torch.nn.functional as F

from fastlora.experts import open_experts
from fastlora.model import make_plain
from fastlora.nn.attention import ProjectionLoRA
from fastlora.nn.bank import Bank, escape
from fastlora.nn.switch import selected, selection
from fastlora.ops import check

MODES = ("lorahub", "sum")


class Composition:
    """The owner of a model's banks: each layer's adapters, stacked once, and the sizes of the forward."""

    def __init__(self, mode):
        self.mode, self.stacks, self.rows, self.tokens, self.one = mode, {}, 1, set(), torch.ones(())

    def stack(self, layers, names):
        """Stack the factors of each layer's adapters, and take the adapters themselves out."""
        for name, layer in layers.items():
            groups = getattr(layer, "groups", 1)
            check.value(groups == 1, name, f"a convolution with groups = {groups}", "one with groups = 1")
            tasks = [layer.tasks._modules.get(escape(adapter)) for adapter in names]
            held = [task for task in tasks if task is not None]
            if not held:
                # a projection of an attention layer
                continue
            r = max(task.r for task in held)
            each = [None if t is None else padded(t.lora_A, t.lora_B * t.scaling.to(t.lora_B.dtype), r) for t in tasks]
            blank = tuple(map(torch.zeros_like, next(pair for pair in each if pair)))
            A, B = zip(*(pair or blank for pair in each), strict=True)
            shapes = A[0].shape, B[0].shape
            if self.mode == "lorahub":
                A, B = (torch.stack(factors).flatten(1) for factors in (A, B))
            else:
                A, B = torch.cat(A), torch.cat(B, 1)
            self.stacks[layer.place] = A, B, shapes
            layer.tasks.clear()

    @contextlib.contextmanager
    def running(self, weights, *inputs):
        """In this thread, run the candidates `weights` (P, N), each on its share of the rows of the model's inputs."""
        self.rows = len(inputs[0]) if inputs else 1
        # what a layer sees that gets all tokens, row by row, in one dimension
        self.tokens = {t.shape[:2].numel() for t in inputs if t.dim() > 1}
        with selected(self, ("composed",), weights):
            yield


def padded(A, B, r):
    """lora_A and lora_B with zeros up to the rank r: their dimensions 0 and 1."""
    more = r - len(A)
    return F.pad(A, (0, 0) * (A.dim() - 1) + (0, more)), F.pad(B, (0, 0) * (B.dim() - 2) + (0, more))


class Composed(Bank):
    """A layer of any kind whose owner is a Composition."""

    @property
    def r(self):
        stacked = self.owner.stacks.get(self.place)
        return stacked[2][0][0] if stacked else 0

    def composed(self, weights):
        """lora_A (P, r, in) and lora_B (P, out, r) of the candidates."""
        A, B, shapes = self.owner.stacks[self.place]
        weights = weights.to(A)
        return [(weights @ t).view(-1, *shape) for t, shape in zip((A, B), shapes, strict=True)]

    def adapters(self):
        """The only candidate's, as one pair."""
        weights = selection(self.owner)[1]
        if self.owner.mode == "lorahub":
            A, B = self.composed(weights)
            return (A[0],), (B[0],), self.owner.one, None
        A, B, _ = self.owner.stacks[self.place]
        gates = weights[0].to(A).repeat_interleave(self.r)
        return (A * gates.view(-1, *(1 for _ in A.shape[1:])),), (B,), self.owner.one, None

    def forward(self, x, *args, **kwargs):
        weights = selection(self.owner)[1]
        if weights is None or self.is_off() or not self.r:
            return self.run(None, x, *args, **kwargs)
        if len(weights) == 1:
            return self.run(self.adapters(), x, *args, **kwargs)
        rows, share = self.owner.rows, self.owner.rows // len(weights)
        if self.owner.mode == "sum":
            A, B, _ = self.owner.stacks[self.place]
            gates = weights.to(A).repeat_interleave(self.r, 1).repeat_interleave(share, 0)
            return self.run(((A,), (B,), self.owner.one, gates), x, *args, **kwargs)
        A, B = self.composed(weights)
        if self.kind not in ("linear", "projection"):
            gates = torch.eye(len(A), dtype=A.dtype, device=A.device).repeat_interleave(share, 0)
            return self.run((A.unbind(), B.unbind(), self.owner.one, gates), x, *args, **kwargs)
        known = len(x) in (1, rows) or x.dim() == 2 and len(x) in self.owner.tokens
        check.value(known, "x", f"shape {tuple(x.shape)}", f"{rows} rows, the batch first, or all their tokens")
        x = x if len(x) >= rows else x.expand(rows, *x.shape[1:])
        # one product with W for all rows, and two batched ones: less work than a gate for each of P adapters
        base = self.run(None, x, *args, **kwargs)
        A, B = A.to(base.dtype), B.to(base.dtype)
        z = torch.bmm(x.reshape(len(A), -1, x.shape[-1]).to(base.dtype), A.mT)
        # base is this call's own tensor
        base.view(len(A), -1, base.shape[-1]).baddbmm_(z, B.mT)
        return base


class ComposedProjection(Composed, ProjectionLoRA):
    """A projection of an attention layer."""


Composed.projection = ComposedProjection


def named(adapters):
    """{name: folder or tensors} of a dictionary or a list of adapters. Raises ValueError: none, or one twice."""
    listed = isinstance(adapters, (list, tuple))
    check.kind(listed or isinstance(adapters, dict), "adapters", type(adapters).__name__, "a list or a dictionary")
    check.value(adapters, "adapters", "none", "at least one")
    if not listed:
        return adapters
    names = [f"adapters[{i}]" if isinstance(source, dict) else str(source) for i, source in enumerate(adapters)]
    twice = sorted({name for name in names if names.count(name) > 1})
    check.value(not twice, "adapters", f"{', '.join(twice)} twice", "each once: it has one weight")
    return dict(zip(names, adapters, strict=True))


def numbers(weights, adapters):
    """{name: number}; ValueError unless there is a finite one for each adapter."""
    if isinstance(weights, dict):
        check.value(set(weights) == set(adapters), "weights", f"names {list(weights)}", f"{list(adapters)}")
        weights = [weights[name] for name in adapters]
    weights = [float(weight) for weight in weights]
    check.value(len(weights) == len(adapters), "weights", f"{len(weights)} numbers", f"{len(adapters)}, one an adapter")
    check.value(all(map(math.isfinite, weights)), "weights", weights, "finite numbers")
    return dict(zip(adapters, weights, strict=True))


@contextlib.contextmanager
def opened(model, adapters, mode):
    """Make the layers of a plain model banks of {name: adapter}, frozen and in eval mode; yields the Composition.

    In the end the model is plain and as it was, also after an error.
    """
    check.value(mode in MODES, "mode", repr(mode), "'lorahub' or 'sum'")
    owner = Composition(mode)
    training = [(module, module.training) for module in model.modules()]
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    layers = open_experts(model, adapters, owner, bank=Composed)
    try:
        with torch.no_grad():
            owner.stack(layers, adapters)
        model.eval().requires_grad_(False)
        yield owner
    finally:
        make_plain(model, merged=False)
        for module, mode_before in training:
            module.training = mode_before
        for name, parameter in model.named_parameters():
            parameter.requires_grad = trained[name]
