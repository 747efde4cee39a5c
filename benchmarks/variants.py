"""Layers of other kinds: a fused q/k/v layer, an embedding, and a layer with eight named tasks."""

import functools

import loralib
import torch
from torch import nn

import fastlora
from fastlora import tasks

R = 8
TASKS = [f"t{i}" for i in range(8)]


def calls(case, device, methods):
    """{method: [one call]}; the methods share the weight and the adapter's values."""
    torch.manual_seed(0)
    x, layers = _BUILD[case.op](case.m)
    layers = {method: layers[method].to(device) for method in methods}
    _check_same(layers, x.to(device))
    return {method: [_call(case, layer, x.to(device))] for method, layer in layers.items()}


def _merged(m):
    built = {"base": nn.Linear(768, 2304)}
    for name, library in (("fastlora", fastlora), ("loralib", loralib)):
        built[name] = library.MergedLinear(768, 2304, r=R, enable_lora=[True, False, True], merge_weights=False)
    return torch.randn(m, 768), _with_equal_values(built)


def _embedding(m):
    built = {"base": nn.Embedding(50_000, 768)}
    for name, library in (("fastlora", fastlora), ("loralib", loralib)):
        built[name] = library.Embedding(50_000, 768, r=R, merge_weights=False)
    return torch.randint(50_000, (m,)), _with_equal_values(built)


def _with_equal_values(built):
    nn.init.normal_(built["loralib"].lora_A, std=0.1)
    nn.init.normal_(built["loralib"].lora_B, std=0.1)
    for name in ("base", "fastlora"):
        built[name].load_state_dict(built["loralib"].state_dict(), strict=name != "base")
    built["base"].weight.requires_grad = False
    return built


class _Chosen(nn.Module):
    def __init__(self, model, choice):
        super().__init__()
        self.model, self.choice = model, choice

    def forward(self, x):
        return self.model(x, tasks=self.choice)


def _tasks(m):
    model = tasks.Model(nn.Sequential(nn.Linear(1024, 1024)), r=R)
    for name in TASKS:
        model.add_task(name, init="original")
    model.requires_grad_(False)
    base = nn.Linear(1024, 1024)
    base.load_state_dict(model.model[0].state_dict(), strict=False)
    chosen = {"base": base, "fastlora": _Chosen(model, TASKS[:1]), "fastlora_8": _Chosen(model, TASKS)}
    base.requires_grad_(False)
    return torch.randn(m, 1024), chosen


_BUILD = {"merged": _merged, "embedding": _embedding, "tasks": _tasks}


def _check_same(layers, x):
    """loralib's layer and fastlora's compute the same; eight tasks are the sum of each one's update."""
    with torch.inference_mode():
        found = {method: layer(x) for method, layer in layers.items()}
        if "loralib" in layers:
            pair = found["fastlora"], found["loralib"]
        else:
            model, base = layers["fastlora"].model, found["base"]
            pair = found["fastlora_8"], base + sum(model(x, task=name) - base for name in TASKS)
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


def _call(case, layer, x):
    if case.mode == "forward":
        return functools.partial(layer, x)
    x = x.requires_grad_() if x.is_floating_point() else x
    # the parameters that this choice of tasks trains, the others have no gradient
    y = layer(x)
    if not y.requires_grad:
        return functools.partial(layer, x)
    dy = torch.randn_like(y)
    wanted = [t for t in (x, *layer.parameters()) if t.requires_grad]
    used = torch.autograd.grad(y, wanted, dy, allow_unused=True)
    wanted = [t for t, grad in zip(wanted, used, strict=True) if grad is not None]
    return lambda: torch.autograd.grad(layer(x), wanted, dy)
