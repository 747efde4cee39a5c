"""accelerate's hooks keep a bound forward of the old class: LoRA must not be lost behind it."""

import copy

import pytest
import torch
from torch import nn

from fastlora.model import inject, remove

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(3, 4)


def wake(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)


def dispatch(model):
    return accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


@pytest.mark.parametrize("dispatch_first", [True, False])
def test_dispatch_before_and_after_inject(dispatch_first):
    model, x = build()
    plain = inject(copy.deepcopy(model), r=2)
    if dispatch_first:
        model = dispatch(model)
        hooks.add_hook_to_module(model[0], hooks.ModelHook())
        assert "_old_forward" in vars(model[0])
    inject(model, r=2)
    if not dispatch_first:
        model = dispatch(model)
        hooks.add_hook_to_module(model[0], hooks.ModelHook())
    for name in ("0.lora_A", "2.lora_A"):
        model.get_parameter(name).data.copy_(plain.get_parameter(name))
    wake(model)
    wake(plain)
    assert torch.equal(model(x), plain(x))
    # taking accelerate's hooks off leaves the bound forward in the instance
    hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(x), plain(x))
    assert torch.equal(remove(model)(x), remove(plain)(x))


def test_offloaded_modules_are_refused():
    model, _ = build()
    model = accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match="0: got a module that accelerate offloads"):
        inject(model, r=2)


def test_offloading_an_injected_model():
    model, x = build()
    wake(inject(model, r=2))
    want = model(x)
    with torch.no_grad():
        assert torch.equal(accelerate.cpu_offload(model, execution_device="cpu")(x), want)
