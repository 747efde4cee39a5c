"""inject and its kin on module trees."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastlora.nn as lora
from fastlora.model import (
    disable_adapter,
    enable_input_require_grads,
    inject,
    mark_only_lora_as_trainable,
    merge,
    merge_and_export,
    print_trainable_parameters,
    remove,
    set_scale,
    unmerge,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.down = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return x + self.down(torch.tanh(self.q_proj(x) * self.k_proj(self.norm(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build():
    torch.manual_seed(0)
    return Model(), torch.randint(0, 10, (2, 4))


def wake(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def adapted(model):
    return {name for name, module in model.named_modules() if isinstance(module, lora.LoRALayer)}


@pytest.mark.parametrize("targets, ends", [
    ("all-linear", ("q_proj", "k_proj", "down")),
    ("q_proj", ("q_proj",)),
    (["q_proj", "down"], ("q_proj", "down")),
    ((r".*\.[qk]_proj"), ("q_proj", "k_proj")),
])  # fmt: skip
def test_targets(targets, ends):
    model, ids = build()
    before = model(ids)
    assert inject(model, r=2, target_modules=targets) is model
    assert adapted(model) == {f"blocks.{i}.{end}" for i in (0, 1) for end in ends}
    torch.testing.assert_close(model(ids), before)


def test_one_whole_name_and_a_bare_layer():
    model, _ = build()
    assert adapted(inject(model, r=2, target_modules="blocks.1.down")) == {"blocks.1.down"}
    assert adapted(inject(nn.Linear(3, 4), r=2)) == {""}


def test_only_the_adapters_train_and_alpha_defaults_to_r():
    model = inject(build()[0], r=3)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    layer = model.blocks[0].q_proj
    assert layer.lora_alpha == layer.r == 3 and layer.scaling == 1 and layer.lora_A.dtype == torch.float32
    half = inject(build()[0].bfloat16(), r=2, lora_alpha=3, dtype=torch.bfloat16).blocks[0].q_proj
    assert half.lora_A.dtype == torch.bfloat16 and half.scaling == 1.5
    assert inject(nn.Linear(2, 2, dtype=torch.float64), r=1).lora_A.dtype == torch.float64


@pytest.mark.parametrize("options, message", [
    ({"target_modules": "q_porj"}, r"target_modules: got 'q_porj', which matches no module, .* such as q_proj"),
    ({"target_modules": ["q_proj", "nothing"]}, "target_modules: got 'nothing', which matches no module"),
    ({"target_modules": ["norm"]}, "target_modules: got 'norm', the name of a LayerNorm, expected layers"),
    ({"target_modules": []}, r"target_modules: got \[\]"),
    ({"r": 0}, "r: got 0, expected an integer of at least 1"),
    ({"lora_dropout": 2}, "lora_dropout: got 2"),
    ({"lora_alpha": "8"}, "lora_alpha: got '8'"),
    ({"dtype": torch.int8}, "dtype: got torch.int8"),
])  # fmt: skip
def test_errors_change_nothing(options, message):
    model, _ = build()
    with pytest.raises(ValueError, match=message):
        inject(model, **options)
    assert not adapted(model) and all(p.requires_grad for p in model.parameters())


def test_injecting_twice_is_an_error():
    model = inject(build()[0], r=2, target_modules="q_proj")
    with pytest.raises(ValueError, match="a model with LoRA layers"):
        inject(model, r=2, target_modules="down")


def test_a_layer_with_an_adapter_of_another_library_is_refused():
    for layer in (pytest.importorskip("loralib").Linear(6, 4, r=2), pytest.importorskip("loralib").Linear(6, 4)):
        with pytest.raises(ValueError, match="0: got a Linear with a r and a lora_alpha"):
            inject(nn.Sequential(layer), r=2)


def test_hooks_ties_pickle_deepcopy_and_base_checkpoints_stay():
    model, ids = build()
    base = copy.deepcopy(model)
    seen = []
    model.blocks[0].q_proj.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    inject(model, r=2)
    model(ids)
    assert seen == ["LoRALinear"]
    model.blocks[0].q_proj._forward_hooks.clear()
    assert model.head.weight is model.embed.weight
    assert isinstance(model.blocks[0].q_proj, nn.Linear)
    assert not [k for k in model.load_state_dict(base.state_dict(), strict=False).missing_keys if "lora_" not in k]
    want = wake(model)(ids)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), torch.load(saved, weights_only=False)):
        assert torch.equal(other(ids), want)
        assert other.head.weight is other.embed.weight
        assert type(other.blocks[0].q_proj) is type(model.blocks[0].q_proj)
    shared = nn.Sequential(layer := nn.Linear(3, 3), nn.ReLU(), layer)
    inject(shared, r=1)
    assert shared[0] is shared[2] and len(list(shared.parameters())) == 4


def test_merge_unmerge_remove_export():
    model, ids = build()
    base = copy.deepcopy(model).eval()
    wake(inject(model.eval(), r=2))
    state, out = copy.deepcopy(model.state_dict()), model(ids)
    assert (out - base(ids)).abs().max() > 0.1
    merge(model)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), out, rtol=1e-4, atol=1e-4)
    assert model.blocks[0].q_proj._merged_copy
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    plain = merge_and_export(model)
    assert not adapted(plain) and type(plain.blocks[0].q_proj) is nn.Linear
    assert list(plain.state_dict()) == list(base.state_dict())
    assert vars(plain.blocks[0].q_proj).keys() == vars(base.blocks[0].q_proj).keys()
    torch.testing.assert_close(plain(ids), out, rtol=1e-4, atol=1e-4)
    assert unmerge(model) is model and torch.equal(model(ids), out)
    assert remove(model) is model and torch.equal(model(ids), base(ids))
    assert not adapted(model) and list(model.state_dict()) == list(base.state_dict())
    with pytest.raises(ValueError, match="a Model without LoRA layers, expected an injected model"):
        merge(model)


def test_merging_a_tied_head_leaves_the_embedding():
    for in_place in (False, True):
        model, ids = build()
        embedding = model.embed.weight.detach().clone()
        out = wake(inject(model.eval(), r=2, target_modules=["head", "down"]))(ids)
        merge(model, in_place=in_place)
        with torch.no_grad():
            torch.testing.assert_close(model(ids), out, rtol=1e-4, atol=1e-4)
        assert torch.equal(model.embed.weight, embedding)
        assert (model.head.weight is model.embed.weight) is not in_place


@pytest.mark.parametrize("options", [{"r": 3}, {"r": 3, "fan_in_fan_out": True}, {"r": 0, "fan_in_fan_out": True}])
def test_exporting_a_bare_layer(options):
    layer = lora.Linear(6, 4, **options)
    if layer.r:
        nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 6)
    model = nn.Sequential(layer, lora.Linear(4, 4, r=1))
    plain = merge_and_export(layer)
    assert type(plain) is nn.Linear and plain.weight.shape == (4, 6) and plain.weight.is_contiguous()
    torch.testing.assert_close(plain(x), layer(x))
    assert type(layer) is lora.Linear
    assert type(remove(model)[0]) is nn.Linear
    torch.testing.assert_close(model[0](x), nn.functional.linear(x, model[0].weight, model[0].bias))


def test_a_forward_of_the_instance_is_refused():
    model, _ = build()
    model.blocks[1].down.forward = lambda x: x
    with pytest.raises(ValueError, match="blocks.1.down: got an instance attribute forward"):
        inject(model, r=2)
    assert not adapted(model)


def test_uninitialised_weights_are_refused():
    with pytest.raises(ValueError, match="0: got a UninitializedParameter as weight"):
        inject(nn.Sequential(nn.LazyLinear(4)), r=2)


def test_meta_device():
    with torch.device("meta"):
        model = Model()
    inject(model, r=2)
    assert model.blocks[0].q_proj.lora_A.is_meta
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    base, ids = build()
    model.load_state_dict(base.state_dict(), strict=False)
    model.head.weight = model.embed.weight
    torch.testing.assert_close(model(ids), base(ids))
    assert all(p.abs().max() > 0 for n, p in model.named_parameters() if "lora_A" in n)


def test_marking_biases_and_printing(capsys):
    model = inject(build()[0], r=2, target_modules="q_proj")
    mark_only_lora_as_trainable(model, bias="lora_only")
    assert [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n] == [
        "blocks.0.q_proj.bias", "blocks.1.q_proj.bias"
    ]  # fmt: skip
    mark_only_lora_as_trainable(model)
    print_trainable_parameters(model)
    total = sum(p.numel() for p in model.parameters())
    assert capsys.readouterr().out == f"trainable params: 48 || all params: {total} || trainable%: {4800 / total:.4f}\n"
    with pytest.raises(ValueError, match="bias: got 'some'"):
        mark_only_lora_as_trainable(model, bias="some")


def test_set_scale_is_linear_and_disable_is_zero():
    model = wake(inject(nn.Linear(4, 4), r=2, lora_alpha=6))
    x = torch.randn(2, 4)
    with disable_adapter(model):
        base = model(x)
    update = model(x) - base
    set_scale(model, 0.5)
    torch.testing.assert_close(model(x) - base, update / 2)
    set_scale(model, 1.0)
    torch.testing.assert_close(model(x) - base, update)


def test_reentrant_checkpointing_of_a_frozen_base():
    model, ids = build()
    wake(inject(model, r=2))

    def run():
        x = model.embed(ids)
        for block in model.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True)
        return model.head(x).square().sum()

    model(ids).square().sum().backward()
    want = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    handle = enable_input_require_grads(model)
    run().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, want[name])
    handle.remove()
    assert not model.embed(ids).requires_grad
    with pytest.raises(ValueError, match="without nn.Embedding"):
        enable_input_require_grads(nn.Linear(2, 2))
