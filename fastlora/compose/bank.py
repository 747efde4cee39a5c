"""Layers that run a composition of their adapters: one for all rows, or one for each of P candidates.

The formulas are `search`'s; each adapter has the largest rank, with zeros beyond its own, and its lora_alpha / r in
lora_B. In the mode "sum" the weights are a bank's gates. Row j of P · n rows runs candidate j // n.
"""

import contextlib
import math

import torch
import torch.nn.functional as F

from fastlora.experts import open_experts
from fastlora.model import make_plain
from fastlora.nn.bank import Bank, escape
from fastlora.nn.switch import is_off, selected, selection
from fastlora.ops import check

MODES = ("lorahub", "sum")


class Composition:
    """The owner of a model's banks: its adapters' keys, each layer's stacked factors, the sizes of the forward."""

    def __init__(self, mode, adapters):
        self.mode, self.keys = mode, tuple(map(escape, adapters))
        self.factors, self.rows, self.tokens, self.one = {}, 1, set(), torch.ones(())

    def running(self, weights, *inputs):
        """In this thread, run the candidates `weights` (P, N), each on its share of the rows of the model's inputs."""
        self.rows = len(inputs[0]) if inputs else 1
        # what a layer sees that gets all tokens, row by row, in one dimension
        self.tokens = {t.shape[:2].numel() for t in inputs if t.dim() > 1}
        if self.mode == "sum":
            weights = weights[0] if len(weights) == 1 else weights.repeat_interleave(self.rows // len(weights), 0)
        return selected(self, self.keys, weights)


def stacked(pairs):
    """lora_A (N, r, in) and lora_B (N, out, r) of N adapters' pairs, with zeros up to the largest rank."""
    r = max(len(A) for A, _ in pairs)
    A = [F.pad(A, (0, 0) * (A.dim() - 1) + (0, r - len(A))) for A, _ in pairs]
    B = [F.pad(B, (0, 0) * (B.dim() - 2) + (0, r - B.shape[1])) for _, B in pairs]
    return torch.stack(A), torch.stack(B)


class Composed(Bank):
    """A layer of any kind in the mode "lorahub", whose owner is a Composition."""

    def stack(self):
        """Give the owner the factors of this layer's adapters, and take the adapters themselves out."""
        held = {key: (t.lora_A, t.lora_B * t.scaling.to(t.lora_B.dtype)) for key, t in self.tasks.items()}
        if held:
            A, B = next(iter(held.values()))
            self.owner.factors[self.place] = stacked([held.get(key, (A[:0], B[:, :0])) for key in self.owner.keys])
        self.tasks.clear()

    @property
    def r(self):
        factors = self.owner.factors.get(self.place)
        return factors[0].shape[1] if factors else 0

    def composed(self):
        """lora_A (P, r, in) and lora_B (P, out, r) of the candidates."""
        weights = selection(self.owner)[1]
        return [torch.tensordot(weights.to(t), t, 1) for t in self.owner.factors[self.place]]

    def adapters(self):
        """One for each candidate, with gates that say which rows of the batch are whose."""
        A, B = self.composed()
        gates = None
        if len(A) > 1:
            gates = torch.eye(len(A), dtype=A.dtype, device=A.device).repeat_interleave(self.owner.rows // len(A), 0)
        return A.unbind(), B.unbind(), self.owner.one, gates

    def forward(self, x, *args, **kwargs):
        weights, rows = selection(self.owner)[1], self.owner.rows
        if weights is None or is_off(self) or not self.r:
            return self.run(None, x, *args, **kwargs)
        if len(weights) == 1 or self.kind not in ("linear", "projection"):
            return self.run(self.adapters(), x, *args, **kwargs)
        known = len(x) in (1, rows) or x.dim() == 2 and len(x) in self.owner.tokens
        check.value(known, "x", f"shape {tuple(x.shape)}", f"{rows} rows, the batch first, or all their tokens")
        x = x if len(x) >= rows else x.expand(rows, *x.shape[1:])
        # one product with W for all rows, and two batched ones: less work than a gate for each of P adapters
        base = self.run(None, x, *args, **kwargs)
        A, B = (t.to(base.dtype) for t in self.composed())
        z = torch.bmm(x.reshape(len(A), -1, x.shape[-1]).to(base.dtype), A.mT)
        # base is this call's own tensor
        base.view(len(A), -1, base.shape[-1]).baddbmm_(z, B.mT)
        return base


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
    """In a block, a plain model's layers are banks of {name: adapter}, frozen, in eval mode; yields the Composition."""
    check.value(mode in MODES, "mode", repr(mode), "'lorahub' or 'sum'")
    owner = Composition(mode, adapters)
    layers = open_experts(model, adapters, owner, bank=Composed if mode == "lorahub" else Bank)
    training = [(module, module.training) for module in model.modules()]
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for name, layer in layers.items():
            groups = getattr(layer, "groups", 1)
            check.value(groups == 1, name, f"a convolution with groups = {groups}", "one with groups = 1")
            if mode == "lorahub":
                layer.stack()
        model.eval().requires_grad_(False)
        yield owner
    finally:
        make_plain(model, merged=False)
        for module, mode_before in training:
            module.training = mode_before
        for name, parameter in model.named_parameters():
            parameter.requires_grad = trained[name]
