"""Which back-end runs a call, and why the others do not, in words."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora import backends
from fastlora.nn.layer import LoRALayer
from fastlora.nn.linear import DenseLoRA


class Explanation:
    """What `explain` found: `calls` holds (where, op, back-end or None, {back-end: objection or None})."""

    def __init__(self, calls):
        self.calls = calls

    def __str__(self):
        if not self.calls:
            return "no fastlora op runs here"
        lines = []
        for where, op, chosen, reasons in self.calls:
            lines.append(f"{where}{op}: {chosen or 'no back-end takes this call'}")
            lines += [f"    {name}: {why}" for name, why in reasons.items() if name != chosen]
        return "\n".join(lines)

    __repr__ = __str__


def _reasons(op, args):
    chosen, why = backends.walk(op, *args)[-1]
    asked = backends.order(op, *args)
    reasons = {}
    for name in backends.NAMES:
        sentence = backends.objection(op, name, *args)
        if sentence is None and name not in asked:
            sentence = backends.passed_over(name)
        elif sentence is None and name != chosen:
            sentence = f"it comes after {chosen}"
        reasons[name] = sentence
    return (chosen if why is None else None), reasons


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
    if not callable(call):
        raise TypeError(f"fastlora: call: got {type(call).__name__}, expected a function or a module")
    if isinstance(call, torch.nn.Module) and not args and not kwargs:
        return Explanation([entry for name, m in call.named_modules() for entry in _layer(name, m)])
    with _Record() as record:
        call(*args, **kwargs)
    return Explanation(record.calls)


def _layer(name, module):
    if not isinstance(module, LoRALayer) or not module.r:
        return []
    A, B = module.lora_A, module.lora_B
    if isinstance(module, DenseLoRA):
        weight = module.base_weight()
        args = (weight.new_empty(1, A.shape[1]), weight, [A], [B], module.scaling, None, None, [], None, 0.0, None)
        return [(f"{name}: ", "lora_linear", *_reasons("lora_linear", args))]
    args = (B.new_empty(1, B.shape[0]), B.new_empty(1, B.shape[1]), [B], module.scaling, None, [], [])
    return [(f"{name}: ", "lora_expand", *_reasons("lora_expand", args))]
