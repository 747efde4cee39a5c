"""What holds for every kind of layer: gradients, merging, copies, compiled and half-precision runs."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora as lora

LINEAR, IMAGE = (3, 5), {1: (2, 4, 5), 2: (2, 4, 5, 6), 3: (2, 4, 5, 6, 3)}
# constructor, arguments, options, shape of x (None: ids)
KINDS = {
    "linear": (lora.Linear, (5, 6), {}, LINEAR),
    "transposed": (lora.Linear, (5, 6), {"fan_in_fan_out": True}, LINEAR),
    "merged": (lora.MergedLinear, (5, 6), {"enable_lora": [True, False, True]}, LINEAR),
    "embedding": (lora.Embedding, (9, 6), {"padding_idx": 0}, None),
    "attention": (lora.MultiheadAttention, (8, 2), {"enable_lora": ["q", "v", "o"]}, (3, 2, 8)),
    "conv1d": (lora.Conv1d, (4, 6, 3), {}, IMAGE[1]),
    "conv2d": (lora.Conv2d, (4, 6, (1, 3)), {"groups": 2, "padding": (0, 1)}, IMAGE[2]),
    "conv3d": (lora.Conv3d, (4, 6, (2, 3, 1)), {"form": "tasks"}, IMAGE[3]),
    "conv1d-peft": (lora.Conv1d, (4, 6, 3), {"form": "peft", "stride": 2}, IMAGE[1]),
    "conv2d-peft": (lora.Conv2d, (4, 6, 3), {"form": "peft", "padding": "same"}, IMAGE[2]),
}
MERGING = [name for name in KINDS if name != "attention"]
every = pytest.mark.parametrize("name", KINDS)


def build(name, seed=0, **options):
    cls, arguments, given, _ = KINDS[name]
    torch.manual_seed(seed)
    layer = cls(*arguments, r=2, lora_alpha=3, **given, **options)
    for key, parameter in layer.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.5)
    return layer


def draw(name, dtype=torch.float32):
    shape = KINDS[name][3]
    if shape is None:
        return torch.tensor([[1, 2, 2], [3, 1, 8]])
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(2))


def call(layer, x):
    y = layer(x, x, x) if isinstance(layer, nn.MultiheadAttention) else layer(x)
    return y[0] if isinstance(y, tuple) else y


def results(layer, x, run=call):
    """y and the gradients of everything that is trained, and of x."""
    x = x.detach().requires_grad_() if x.is_floating_point() else x
    torch.manual_seed(3)
    y = run(layer, x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype)
    wanted = [t for t in (x, *layer.parameters()) if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def alike(have, want, rtol=1e-5, atol=1e-5):
    for one, other in zip(have, want, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=rtol, atol=atol)


def near(have, want, share):
    """Each within `share` of the largest number that is wanted."""
    for one, other in zip(have, want, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=share * float(other.abs().max()))


@every
def test_behaviour_08_backward_has_the_forwards_dropout_mask(name):
    layer, x = build(name, lora_dropout=0.5, dtype=torch.float64), draw(name, torch.float64)
    x = x.requires_grad_() if x.is_floating_point() else x

    def run(*_):
        torch.manual_seed(5)
        return call(layer, x)

    assert any(not torch.equal(call(layer, x), run()) for _ in range(8))
    trained = [t for t in (x, *layer.parameters()) if t.requires_grad]
    assert torch.autograd.gradcheck(run, trained, fast_mode=True)


@every
def test_behaviour_08_dropout_is_not_on_the_base_path(name):
    layer, x = build(name, lora_dropout=1.0), draw(name)
    with lora.disable_adapter(layer):
        want = call(layer, x)
    torch.testing.assert_close(call(layer, x), want)
    assert not torch.allclose(call(layer.eval(), x), want, atol=0.01)
    call(layer.train(), x).sum().backward()
    assert all(p.grad.eq(0).all() for key, p in layer.named_parameters() if "lora_" in key)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        arguments = {"r": 2, "lora_alpha": 3, "dtype": torch.float64}
        self.embed = lora.Embedding(7, 8, **arguments)
        self.viewed = lora.Conv1d(8, 8, 3, padding=1, **arguments)
        self.down_up = lora.Conv1d(8, 8, 3, padding=1, form="peft", **arguments)
        self.fused = lora.MergedLinear(8, 8, enable_lora=[True, False], **arguments)
        self.attention = lora.MultiheadAttention(8, 2, ["q", "v", "o"], batch_first=True, **arguments)
        self.head = lora.Linear(8, 3, **arguments)

    def forward(self, ids):
        x = torch.tanh(self.down_up(torch.tanh(self.viewed(self.embed(ids).mT)))).mT
        x = x + torch.tanh(self.fused(x))
        return self.head(x + self.attention(x, x, x)[0])


def test_behaviour_09_the_gradient_below_a_layer_goes_through_its_update():
    """loratorch's is that of W alone."""
    torch.manual_seed(0)
    stack, ids = Stack(), torch.randint(0, 7, (2, 4))
    for key, parameter in stack.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.5)
    trained = [p for key, p in stack.named_parameters() if "lora_" in key]
    assert torch.autograd.gradcheck(lambda *_: stack(ids), trained)


@every
def test_behaviour_10_train_and_eval_return_the_layer(name):
    layer = build(name)
    assert layer.eval() is layer and layer.train() is layer
    parent = nn.ModuleList([layer]).eval()
    assert all(m.merged for m in parent.modules() if isinstance(m, lora.LoRALayer) and m.merge_weights)


def step(layer, x):
    adapters = [p for key, p in layer.named_parameters() if "lora_" in key]
    optimizer = torch.optim.AdamW(adapters, lr=0.3, fused=True)
    call(layer, x).sum().backward()
    optimizer.step()


CHANGES = {
    "step": step,
    "load": lambda layer, x: layer.load_state_dict({n: t + 0.5 for n, t in layer.state_dict().items()}),
    "assign": lambda layer, x: layer.load_state_dict({n: t + 0.5 for n, t in layer.state_dict().items()}, assign=True),
    "scale": lambda layer, x: layer.set_scale(0.3),
    "rank": lambda layer, x: layer.use_rank(1),
    "weight": lambda layer, x: layer.weight.add_(1.0),
}


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("change", CHANGES)
def test_behaviour_11_a_merged_weight_is_never_stale(name, change):
    layer, x = build(name).eval(), draw(name)
    with torch.no_grad():
        before = call(layer, x)
        assert torch.equal(call(layer, x), before) and layer._merged_copy
    with torch.set_grad_enabled(change == "step"):
        CHANGES[change](layer, x)
    with torch.no_grad():
        after = call(layer, x)
        torch.testing.assert_close(after, call(layer.train(), x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)


@every
def test_behaviours_12_and_13_a_thousand_merges_in_bfloat16_leave_every_tensor_alone(name):
    layer, x = build(name).bfloat16(), draw(name, torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    with torch.no_grad():
        for _ in range(1000):
            layer.train()
            layer.eval()
            if _ % 50 == 0:
                call(layer, x)
    after = layer.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


@every
def test_compiles_whole(name):
    layer, x = build(name), draw(name)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    alike(results(layer, x, compiled), results(layer, x))
    layer.eval()
    with torch.no_grad():
        alike([compiled(layer, x)], [call(layer, x)], atol=1e-4)


def test_inductor_with_sizes_unknown():
    """It fails on operands of an op whose strides it cannot sort."""
    layer, x = lora.Conv2d(4, 6, 3, r=2, form="peft"), draw("conv2d-peft")
    nn.init.normal_(layer.lora_B)
    torch._dynamo.reset()
    alike([torch.compile(layer, fullgraph=True, dynamic=True)(x)], [layer(x)], atol=1e-4)


@every
def test_sizes_do_not_compile_again_and_again(name):
    layer, x, graphs = build(name), draw(name), []
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    dim = 1 if name == "attention" else 0
    for rows in (2, 3, 4, 5):
        compiled(layer, torch.cat([x, x, x], dim).narrow(dim, 0, rows))
    assert len(graphs) == 2


@every
def test_autocast_and_mixed_precision(name):
    layer, x = build(name), draw(name)
    want = results(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        have = results(layer, x)
    near(have, want, 0.04)
    # as inject makes it: a half-precision base with float32 adapters; and everything in one half type
    mixed = copy.deepcopy(layer)
    for key, parameter in mixed.named_parameters():
        if "lora_" not in key:
            parameter.data = parameter.data.bfloat16()
    for half, dtype in ((mixed, torch.bfloat16), (copy.deepcopy(layer).half(), torch.float16)):
        have = results(half, x.to(dtype) if x.is_floating_point() else x)
        assert have[0].dtype == dtype
        near(have, want, 0.04)


@every
def test_copies(name):
    layer, x = build(name, lora_dropout=0.3), draw(name)
    want = results(layer, x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        alike(results(other, x), want, 0, 0)


@every
def test_activation_checkpointing_repeats_the_mask(name):
    layer, x = build(name, lora_dropout=0.5), draw(name)
    again = results(layer, x, lambda layer, x: checkpoint(call, layer, x, use_reentrant=False))
    alike(again, results(layer, x), 0, 0)


@every
def test_from_the_meta_device(name):
    cls, arguments, given, _ = KINDS[name]
    layer = cls(*arguments, r=2, lora_alpha=3, device="meta", **given).to_empty(device="cpu")
    for module in layer.modules():
        getattr(module, "reset_parameters", getattr(module, "_reset_parameters", lambda: None))()
    y = call(layer, draw(name))
    with lora.disable_adapter(layer):
        alike([call(layer, draw(name))], [y])
    scales = [float(m.scaling) for m in layer.modules() if isinstance(m, lora.LoRALayer)]
    assert set(scales) == {1.5} and y.isfinite().all()


@every
def test_export_and_remove_give_torchs_layer(name):
    layer, x = build(name), draw(name)
    y, state = call(layer, x).detach(), {key: t.clone() for key, t in layer.state_dict().items()}
    exported, plain = lora.merge_and_export(layer), lora.remove(copy.deepcopy(layer))
    base = KINDS[name][0].lora_base
    for module in (exported, plain):
        options = {k: v for k, v in KINDS[name][2].items() if k not in ("enable_lora", "fan_in_fan_out", "form")}
        assert type(module) is base and vars(module).keys() == vars(base(*KINDS[name][1], **options)).keys()
    alike([call(exported, x)], [y], 1e-4, 1e-4)
    with lora.disable_adapter(layer):
        alike([call(plain, x)], [call(layer, x)])
    assert all(torch.equal(tensor, state[key]) for key, tensor in layer.state_dict().items())
    assert call(layer, x).is_contiguous()


@every
def test_explain_lists_what_a_call_runs(name):
    layer = build(name)
    listed = [op for _, op, _, _ in lora.explain(layer).calls]
    ran = [op.removesuffix("_forward") for _, op, _, _ in lora.explain(call, layer, draw(name)).calls]
    assert listed == ran
    assert bool(ran) == (layer.kind != "conv" or layer.form == "peft")
