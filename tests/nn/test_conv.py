"""Convolutions in three forms: loralib's numbers, shapes for 1 and 3 dimensions, and what loralib leaves out."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastlora as lora

loralib = pytest.importorskip("loralib")
LAYERS = {1: lora.Conv1d, 2: lora.Conv2d, 3: lora.Conv3d}
PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
FORMS = ("loralib", "peft", "tasks")


def image(n, dtype=torch.float32, channels=4):
    torch.manual_seed(3)
    return torch.randn(2, channels, *range(5, 5 + n), dtype=dtype)


def layer(n, kernel=3, form="loralib", dtype=torch.float32, **options):
    torch.manual_seed(0)
    made = LAYERS[n](4, 6, kernel, r=2, lora_alpha=6, form=form, dtype=dtype, **options)
    nn.init.normal_(made.lora_A), nn.init.normal_(made.lora_B)
    return made


CIRCULAR = {"padding": 2, "padding_mode": "circular"}


@pytest.mark.parametrize(
    "options", [{}, {"padding": 1, "stride": 2}, {"groups": 2}, {"dilation": 2, "bias": False}, CIRCULAR]
)
@pytest.mark.parametrize("training", [True, False])
def test_conv2d_as_loralib(options, training):
    found, layers = [], []
    for library in (loralib, lora):
        torch.manual_seed(0)
        made = library.Conv2d(4, 6, 3, r=2, lora_alpha=6, **options)
        nn.init.normal_(made.lora_B)
        made.train(training)
        x = image(2).requires_grad_()
        with torch.set_grad_enabled(training):
            y = made(x)
        torch.manual_seed(1)
        grads = torch.autograd.grad(y, [x, made.lora_A, made.lora_B], torch.randn_like(y)) if training else []
        found.append([y, *grads])
        layers.append(made)
    for have, expected in zip(*reversed(found), strict=True):
        torch.testing.assert_close(have, expected, rtol=1e-4, atol=1e-5)
    theirs, ours = layers
    want = {n.removeprefix("conv."): t for n, t in theirs.train() or theirs.state_dict().items()}
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in want.items()}
    assert torch.equal(ours.lora_A, want["lora_A"]) and ours.conv.weight is ours.weight


def test_behaviour_14_the_product_is_viewed_as_the_weight():
    """And loratorch's shapes for one and three dimensions, where loralib's fail."""
    shapes = {1: ((6, 12), (6, 6)), 2: ((6, 12), (18, 6)), 3: ((6, 36), (18, 6))}
    for n, (a, b) in shapes.items():
        made, x = layer(n), image(n)
        assert (tuple(made.lora_A.shape), tuple(made.lora_B.shape)) == (a, b)
        weight = made.weight + 3.0 * (made.lora_B @ made.lora_A).view(made.weight.shape)
        want = getattr(nn.functional, f"conv{n}d")(x, weight, made.bias)
        torch.testing.assert_close(made(x), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError):
        loralib.Conv3d(4, 6, 3, r=2)(image(3))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_peft_form_is_a_convolution_down_and_one_up(n):
    made, x = layer(n, form="peft", padding=1, stride=2, dilation=2), image(n)
    torch.manual_seed(0)
    down = PLAIN[n](4, 2, 3, padding=1, stride=2, dilation=2, bias=False)
    up = PLAIN[n](2, 6, 1, bias=False)
    down.weight, up.weight = made.lora_A, made.lora_B
    base = getattr(nn.functional, f"conv{n}d")(x, made.weight, made.bias, 2, 1, 2)
    torch.testing.assert_close(made(x), base + 3.0 * up(down(x)))


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("form", FORMS)
def test_padding_modes_hold_for_the_adapter_too(form, padding_mode):
    """Beside the weight, where the adapter is a convolution of its own: in PEFT's form, and with dropout."""
    made, x = layer(2, form=form, padding=(1, 2), padding_mode=padding_mode, lora_dropout=1e-6), image(2)
    options = {"padding": (1, 2), "padding_mode": padding_mode, "bias": False}
    down, up, base = nn.Conv2d(4, 2, 3, **options), nn.Conv2d(2, 6, 1, bias=False), nn.Conv2d(4, 6, 3, **options)
    base.weight = made.weight
    if form == "peft":
        down.weight, up.weight = made.lora_A, made.lora_B
        update = up(down(x))
    else:
        update = copy.deepcopy(base).requires_grad_(False)
        update.weight.copy_((made.lora_B @ made.lora_A).view(6, 4, 3, 3))
        update = update(x)
    torch.testing.assert_close(made(x), base(x) + made.bias[:, None, None] + 3.0 * update, rtol=1e-4, atol=1e-4)


def test_peft_form_equals_peft():
    peft = pytest.importorskip("peft")
    for groups in (1, 2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 6, (3, 2), groups=groups, padding=1))
        ours = lora.inject(copy.deepcopy(model), r=2, lora_alpha=6, target_modules=["0"])[0]
        nn.init.normal_(ours.lora_B)
        config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
        theirs = peft.get_peft_model(model, config).base_model.model[0]
        theirs.lora_A["default"].weight, theirs.lora_B["default"].weight = ours.lora_A, ours.lora_B
        torch.testing.assert_close(ours(image(2)), theirs(image(2)), rtol=1e-4, atol=1e-5)


CASES = [
    (1, 3, {"padding": "same"}),
    (2, (3, 2), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    (2, 3, {"groups": 2, "padding": 1, "padding_mode": "reflect"}),
    (3, (1, 2, 3), {"padding": 1, "padding_mode": "replicate"}),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "kernel", "options"), CASES)
def test_gradients_in_float64(form, n, kernel, options):
    made = layer(n, kernel, form, torch.float64, **options)
    made.weight.requires_grad = True
    x = image(n, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: made(x), (x, *made.parameters()), fast_mode=True)
    torch.testing.assert_close(made(x)[:1].squeeze(0), made(x[0]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_export_merge_copies_and_compile(form, n):
    made, x = layer(n, form=form, padding=1), image(n)
    y = made(x).detach()
    exported = lora.merge_and_export(made)
    assert type(exported) is PLAIN[n] and type(made) is LAYERS[n]
    torch.testing.assert_close(exported(x), y, rtol=1e-4, atol=1e-4)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(x), y)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(made, fullgraph=True, backend="aot_eager")(x), y)
    weight = made.weight.clone()
    with torch.no_grad():
        torch.testing.assert_close(made.eval()(x), y, rtol=1e-4, atol=1e-4)
        assert made.merged and made._merged_copy
        made.lora_B.zero_()
        torch.testing.assert_close(made(x), getattr(nn.functional, f"conv{n}d")(x, weight, made.bias, 1, 1))
    assert torch.equal(made.weight, weight)


@pytest.mark.parametrize("form", FORMS)
def test_dropout_acts_on_the_adapters_input_alone(form):
    """loralib takes lora_dropout and ignores it."""
    made, x = layer(2, form=form, lora_dropout=0.5), image(2)
    base = nn.functional.conv2d(x, made.weight, made.bias)
    update = made.eval()(x) - base
    made.train()
    mean = sum(made(x) for _ in range(600)).detach() / 600 - base
    assert (mean - update).norm() < 0.2 * update.norm() and not torch.allclose(made(x), made(x))
    made.lora_dropout.p = 1.0
    torch.testing.assert_close(made(x), base)


def test_bfloat16_base_with_float32_adapters():
    model = nn.Sequential(nn.Conv2d(4, 6, 3)).bfloat16()
    before = model(image(2).bfloat16())
    made = lora.inject(model, r=2, target_modules=["0"])[0]
    assert made.lora_A.dtype == torch.float32 and made.form == "peft"
    assert torch.equal(made(image(2).bfloat16()), before)
    made(image(2).bfloat16()).sum().backward()
    assert made.lora_B.grad.dtype == torch.float32 and made.lora_B.grad.ne(0).any()
    half = layer(2).bfloat16()
    torch.testing.assert_close(half(image(2).bfloat16()).float(), layer(2)(image(2)), rtol=0.05, atol=0.5)


def test_bad_arguments_and_refusals():
    with pytest.raises(ValueError, match="form: got 'x', expected one of loralib, peft, tasks"):
        lora.Conv2d(4, 6, 3, r=2, form="x")
    with pytest.raises(ValueError, match="r: got 3, expected a multiple of groups = 2"):
        lora.Conv2d(4, 6, 3, r=3, groups=2, form="peft")
    grouped = layer(2, form="peft", groups=2)
    with pytest.raises(ValueError, match="groups = 2, expected groups = 1"):
        lora.merge_and_export(grouped)
    assert torch.isfinite(grouped(image(2))).all() and type(grouped) is lora.Conv2d
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3))
    with pytest.raises(ValueError, match="target_modules: got '0', the name of a ConvTranspose2d"):
        lora.inject(model, target_modules=["0"])
    plain = lora.Conv2d(4, 6, 3)
    assert list(plain.state_dict()) == ["weight", "bias"] and plain.weight.requires_grad


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_result_is_laid_out_as_torchs(n):
    """Programs flatten it with view."""
    x = image(n)
    for options in ({}, {"form": "peft"}):
        assert layer(n, **options)(x).is_contiguous()
    if n > 1:
        last = torch.channels_last if n == 2 else torch.channels_last_3d
        made, x = layer(n, form="peft").to(memory_format=last), x.to(memory_format=last)
        assert made(x).stride() == lora.remove(copy.deepcopy(made))(x).stride() != layer(n)(image(n)).stride()


def test_a_grouped_update_in_pefts_form_runs_beside_the_weight():
    """Its ΔW mixes the groups, so no weight of this convolution can hold it."""
    made, x = layer(2, form="peft", groups=2), image(2)
    y = made(x)
    with torch.no_grad():
        torch.testing.assert_close(made.eval()(x), y)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 3, groups=2))
    lora.inject(model, r=2, target_modules=["0", "1"])
    for in_place in (False, True):
        with pytest.raises(ValueError, match="1: got a LoRAConv2d in the form 'peft' with groups = 2, expected groups"):
            lora.merge(model, in_place)
        assert all(isinstance(m, lora.LoRALayer) and not m.merged for m in model)


def test_the_sum_is_rounded_once():
    """In training as in the merged weight."""
    made = layer(2).bfloat16()
    with torch.no_grad():
        exact = made.weight.float() + made.update(*made.adapters())
        x = image(2).bfloat16()
        y = nn.functional.conv2d(x, exact.bfloat16(), made.bias)
        assert torch.equal(made(x), y) and torch.equal(made.eval()(x), y)
