"""One linear layer with the same W, A and B in every library, as functions of x; libraries are imported when used."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import fastlora

from .cases import DTYPES


def build(method, case, weight, lora_A, lora_B):
    """(function of x, the parameters that it trains) for W (n, k), A (r, k), B (n, r) in fp32 or the base's dtype."""
    if method == "base":
        return (lambda x: F.linear(x, weight)), []
    dtype = DTYPES[case.dtype]
    if method in ("addmm", "compile"):
        a, b = (nn.Parameter(t.to(dtype)) for t in (lora_A, lora_B))
        formula = _addmm if method == "addmm" else torch.compile(_unfused, dynamic=False)
        return (lambda x: formula(x, weight, a, b)), [a, b]
    layer = _LAYERS[method.removesuffix("_bf16")](case, weight, method.endswith("_bf16"))
    trained = [p for p in layer.parameters() if p.requires_grad]
    with torch.no_grad():
        for p, value in zip(trained, (lora_A, lora_B), strict=True):
            p.copy_(value)
    return layer, trained


def _unfused(x, weight, a, b):
    return F.linear(x, weight) + F.linear(F.linear(x, a), b) * 1.0


def _addmm(x, weight, a, b):
    y, z = F.linear(x, weight), F.linear(x, a)
    return torch.addmm(y, z, b.T) if torch.is_grad_enabled() else y.addmm_(z, b.T)


def _plain(case, weight):
    linear = nn.Linear(case.k, case.n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return nn.Sequential(linear)


def _fastlora(case, weight, half):
    dtype = DTYPES[case.dtype] if half else None
    return fastlora.inject(_plain(case, weight), r=case.r, lora_alpha=case.r, target_modules=["0"], dtype=dtype)[0]


def twin(model):
    """A copy of the modules that shares every parameter and buffer."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=shared)


def _loralib(case, weight, half):
    import loralib

    layer = loralib.Linear(
        case.k, case.n, r=case.r, lora_alpha=case.r, merge_weights=False, bias=False, dtype=weight.dtype
    ).to(weight.device)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _peft(case, weight, half):
    import peft

    config = peft.LoraConfig(r=case.r, lora_alpha=case.r, target_modules=["0"])
    return peft.get_peft_model(_plain(case, weight), config, autocast_adapter_dtype=not half).base_model.model[0]


_LAYERS = {"fastlora": _fastlora, "loralib": _loralib, "peft": _peft}
