"""X-LoRA: a layer with eight gated experts against PEFT's loop over them, and a whole model against PEFT's."""

import contextlib
import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import peft
import torch
from peft.tuners.xlora.layer import XLoraLinearLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fastlora import mixture
from fastlora.experts import open_experts, save_expert
from fastlora.nn.bank import Owner, escape
from fastlora.nn.switch import selected

from .cases import DTYPES

EXPERTS, R, SIZE = 8, 16, 1024
NAMES = [f"e{i}" for i in range(EXPERTS)]
_in_force = contextlib.ExitStack()


def calls(case, device, methods):
    """{method: [one call]}; the methods share the weight, the experts' values and the gates."""
    torch.manual_seed(0)
    return (_layer_calls if case.op == "gated" else _model_calls)(case, device, methods)


def _layer_calls(case, device, methods):
    dtype = DTYPES[case.dtype]
    x = torch.randn(1, case.m, SIZE, device=device, dtype=dtype)
    gates = torch.randn(1, case.m, EXPERTS, device=device).softmax(-1).to(dtype)
    base = nn.Linear(SIZE, SIZE, bias=False, device=device, dtype=dtype).requires_grad_(False)
    with tempfile.TemporaryDirectory() as root:
        ours, theirs = _gated_layers(base, dtype, Path(root))
    # in force from here on: a mixture sets the gates once for all of its layers
    gates.requires_grad_(case.mode == "training")
    _in_force.close()
    _in_force.enter_context(selected(ours.owner, tuple(map(escape, NAMES)), gates))

    def loop(x, gates):
        return theirs.forward(x, scalings=gates[:, :, None])

    functions = {"base": lambda x, gates: base(x), "fastlora": lambda x, gates: ours(x), "peft": loop}
    with torch.no_grad():
        close = 5e-2 if case.dtype == "bf16" else 1e-3
        torch.testing.assert_close(ours(x), loop(x, gates), rtol=close, atol=close)
    if case.mode == "forward":
        return {m: [functools.partial(functions[m], x, gates)] for m in methods}
    x, dy = x.requires_grad_(), torch.randn(1, case.m, SIZE, dtype=dtype)
    wanted = {m: (x,) if m == "base" else (x, gates) for m in methods}
    return {m: [lambda m=m: torch.autograd.grad(functions[m](x, gates), wanted[m], dy)] for m in methods}


def _gated_layers(base, dtype, root):
    """(a bank of experts, X-LoRA's own layer in PEFT's implementation) on the same weight, experts in x's dtype."""
    model = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False, dtype=dtype))
    model[0].weight = base.weight
    config = peft.LoraConfig(r=R, lora_alpha=R, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(base), config, NAMES[0], autocast_adapter_dtype=False)
    for name in NAMES[1:]:
        theirs.add_adapter(name, config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.05)
    theirs.requires_grad_(False).base_model.set_adapter(NAMES)
    theirs.requires_grad_(False).to(dtype).save_pretrained(root)
    folders = {name: root / name for name in NAMES}
    (ours,) = open_experts(model, folders, Owner(), dtype=dtype).values()
    target = theirs.base_model.model[0].eval()
    xlora = SimpleNamespace(global_scaling_weight=1, top_k_lora=None, enable_softmax_topk=False)
    looped = XLoraLinearLayer(SimpleNamespace(disabled=False), target, target.forward, 0, xlora)
    return ours.eval(), looped


def _model_calls(case, device, methods):
    model, ids = _llama(), torch.randint(3, 1024, (1, case.m))
    with tempfile.TemporaryDirectory() as root:
        folders = _experts(Path(root))
        config = mixture.xLoRAConfig(layerwise_scalings=False)
        ours = mixture.add_xlora_to_model(_llama(), config, folders)
        adapters = dict(zip(map(str, range(EXPERTS)), map(str, folders.values()), strict=True))
        theirs = peft.get_peft_model(_llama(), peft.XLoraConfig(hidden_size=512, adapters=adapters))
    own = ours.xlora_classifier.state_dict()
    for mine, their in zip(own.values(), theirs.base_model.internal_xlora_classifier.parameters(), strict=True):
        their.data.copy_(mine)
    models = {"base": model, "fastlora": ours, "peft": theirs}
    models = {method: models[method].to(device).eval() for method in methods}
    ids = ids.to(device)
    with torch.inference_mode():
        logits = {method: made(input_ids=ids).logits for method, made in models.items()}
    torch.testing.assert_close(logits["fastlora"], logits["peft"], rtol=1e-3, atol=1e-3)
    if (logits["fastlora"] - logits["base"]).abs().max() < 1e-2:
        raise SystemExit("the experts do nothing")
    if case.op == "xlora":
        return {m: [functools.partial(made, input_ids=ids)] for m, made in models.items()}
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    cached = {m: {} if m == "peft" else {"use_cache": True} for m in methods}
    return {m: [functools.partial(made.generate, input_ids=ids, **options, **cached[m])] for m, made in models.items()}


def _llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def _experts(root):
    """{name: folder} of eight experts on all linear layers but the head."""
    model = _llama()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    shapes = {f"{name}.lora_A": (R, m.in_features) for name, m in linear.items()}
    shapes |= {f"{name}.lora_B": (m.out_features, R) for name, m in linear.items()}
    tensors = {expert: {name: torch.randn(shape) * 0.03 for name, shape in shapes.items()} for expert in NAMES}
    open_experts(model, tensors, Owner())
    for expert in NAMES:
        save_expert(model, expert, root / expert)
    return {expert: root / expert for expert in NAMES}
