"""Which back-end runs a call, and why the others do not, in words."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora import backends
from fastlora.nn.attention import AttentionLoRA, ProjectionLoRA
from fastlora.nn.layer import LoRALayer
from fastlora.nn.linear import DenseLoRA, OpaqueLoRA
from fastlora.nn.switch import rank_list
from fastlora.ops import check


class Explanation:
    """What `explain` found: `calls` holds (where, op, back-end or None, {back-end: why not, or its form on a GPU})."""

    def __init__(self, calls):
        self.calls = calls

    def __repr__(self):
        lines = []
        for where, op, chosen, reasons in self.calls:
            lines.append(f"{where}{op}: {chosen or 'no back-end takes this call'}")
            lines += [f"    {name}: {why}" for name, why in reasons.items() if why]
        return "\n".join(lines) or "no fastlora op runs here"


def _reasons(op, args):
    """(the back-end that runs the call, or None, {back-end: why it does not})"""
    why, asked = {name: backends.objection(op, name, *args) for name in backends.NAMES}, backends.order(op, *args)
    chosen = next((name for name in asked if why[name] is None), None)
    for name in why.keys() - {chosen}:
        why[name] = why[name] or (f"it comes after {chosen}" if name in asked else backends.passed_over())
    if chosen == "native":
        why[chosen] = backends.gpu_form(op, args)
    return chosen, why


class _Record(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, op = func.namespace, func._schema.name.partition("::")[2]
        if name == "fastlora" and op != "draw_seed":
            self.calls.append(("", op, *_reasons(op, args)))
        return func(*args, **(kwargs or {}))


def explain(call, *args, **kwargs):
    """Say which back-end runs a call and why the others do not.

    `call` is a function or a module, called with the arguments; every op of fastlora in it is one entry. A module
    without arguments is not run: its LoRA layers are listed with the back-end that a one-row input would take.
    Returns an Explanation whose str() is the text. Raises TypeError for what cannot be called.
    """
    check.kind(callable(call), "call", type(call).__name__, "a function or a module")
    if isinstance(call, torch.nn.Module) and not args and not kwargs:
        return Explanation([entry for name, m in call.named_modules() for entry in _layer(name, m)])
    with _Record() as record:
        call(*args, **kwargs)
    return Explanation(record.calls)


def _layer(name, module):
    found = []
    if isinstance(module, AttentionLoRA):
        weights = module.projection_weights()
        found = [(f"{name}.lora_{n}".strip("."), p, weights[n]) for n, p in module.projections().items()]
    elif isinstance(module, LoRALayer) and not isinstance(module, ProjectionLoRA):
        found = [(name, module, None)]
    calls = [(where, *call) for where, layer, weight in found if layer.r for call in _calls(layer, weight)]
    return [(where and f"{where}: ", op, *_reasons(op, args)) for where, op, args in calls]


def _calls(layer, weight):
    """(op, its arguments) of a layer's forward, for an input of one row; none for a convolution with W + ΔW."""
    A, B, scaling, gates = layer.adapters()
    gates = None if gates is None or gates.dim() > 1 else gates
    ranks = rank_list(A, gates)
    if layer.kind == "merged":
        B = tuple(map(layer.block_form, B))
    if weight is not None or isinstance(layer, DenseLoRA):
        weight = layer.base_weight() if weight is None else weight
        x = weight.new_empty(1, weight.shape[1])
        return [("lora_linear", (x, weight, A, B, scaling, None, gates, ranks, None, 0.0, None))]
    if layer.kind == "conv":
        if layer.form != "peft":
            return []
        B = layer.up(B)
    # a quantised layer's x has another dtype than its weight may have
    x, y = A[0].new_empty(1, A[0].shape[1]), B[0].new_empty(1, B[0].shape[0])
    z = B[0].new_empty(1, sum(b.shape[1] for b in B))
    shrink = [("lora_shrink", (x, A, 0.0, None))] if isinstance(layer, OpaqueLoRA) else []
    return [*shrink, ("lora_expand", (y, z, B, scaling, gates, ranks, (), None))]
