"""MultiheadAttention beside torch's: gradients, dropout, lone examples, layouts, and what it refuses."""

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fastlora as lora

OPTIONS = [
    {"dropout": 0.4},
    {"kdim": 5, "batch_first": True},
    {"vdim": 7, "add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "bias": False, "batch_first": True, "dropout": 0.4},
]


def pair(options, enable_lora=("q", "v", "o"), dtype=torch.float64):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, dtype=dtype, **options)
    ours = lora.MultiheadAttention(8, 2, list(enable_lora), r=2, lora_alpha=4, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    return theirs, ours.requires_grad_()


def inputs(options, batched, dtype=torch.float64):
    made = []
    for length, size in ((3, 8), (5, options.get("kdim", 8)), (5, options.get("vdim", 8))):
        batch = (4, length) if options.get("batch_first") else (length, 4)
        made.append(torch.randn(*(batch if batched else (length,)), size, dtype=dtype, requires_grad=True))
    return made


def masks(batched, dtype=torch.float64):
    n = 4 if batched else 1
    padding = torch.zeros(n, 5, dtype=torch.bool)
    padding[0, 3:] = padding[-1, 0] = True
    padding = padding if batched else padding[0]
    each = torch.rand(2 * n, 3, 5) > 0.7
    each[..., 1] = False
    floats = (torch.randn(3, 5, dtype=dtype), torch.randn(2 * n, 3, 5, dtype=dtype))
    paddings = (None, padding, torch.zeros(padding.shape, dtype=dtype).masked_fill(padding, -3))
    return itertools.product(paddings, (None, torch.ones(3, 5).triu(3).bool(), each, *floats))


def results(attention, given, names, **kw):
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y, weights = attention(*given, **kw)
    dy = torch.randn(y.shape, dtype=y.dtype)
    trained = [*given, *map(attention.get_parameter, names)]
    return y, weights, *torch.autograd.grad(y, trained, dy, allow_unused=True)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("batched", [True, False])
def test_gradients_and_dropout_as_torchs(options, batched):
    """The same seed drops the same attention weights."""
    theirs, ours = pair(options)
    given, names = inputs(options, batched), [name for name, _ in theirs.named_parameters()]
    for padding, mask in masks(batched):
        for weights in (True, False):
            kw = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": weights}
            want, have = (results(m, given, names, **kw) for m in (theirs, ours))
            for one, other in zip(have, want, strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("options", [{}, {"vdim": 7, "batch_first": True}])
@pytest.mark.parametrize("enable_lora", ["q", "k", "v", "o", "qvo"])
def test_gradients_as_of_the_composed_weights(options, enable_lora):
    """torch's layer with W + scaling B A for each enabled projection, so that autograd gives all gradients."""
    theirs, ours = pair(options, enable_lora)
    for projection in ours.projections().values():
        nn.init.normal_(projection.lora_B)
    adapters = {name: p for name, p in ours.named_parameters() if "lora_" in name}

    def composed():
        weights = dict(ours.projection_weights())
        for name in enable_lora:
            weights[name] = weights[name] + 2.0 * adapters[f"lora_{name}.lora_B"] @ adapters[f"lora_{name}.lora_A"]
        base = {name: p for name, p in ours.named_parameters() if "lora_" not in name}
        if "in_proj_weight" in base:
            base["in_proj_weight"] = torch.cat([weights[name] for name in "qkv"])
        else:
            base |= {f"{name}_proj_weight": weights[name] for name in "qkv"}
        return {**base, "out_proj.weight": weights["o"]}

    given = inputs(options, True)
    want = torch.func.functional_call(theirs, composed(), tuple(given))[0]
    have = ours(*given)[0]
    torch.testing.assert_close(have, want)
    dy, trained = torch.randn_like(want), [*given, *ours.parameters()]
    for one, other in zip(*(torch.autograd.grad(y, trained, dy) for y in (have, want)), strict=True):
        torch.testing.assert_close(one, other)


def test_only_vs_part_moves_with_vs_adapter():
    """The projections as the layer sees them: q and k stay to the bit where lora_v changes."""
    _, ours = pair({}, "qv")
    given = inputs({}, True)
    before = ours._project(*given)
    nn.init.normal_(ours.lora_v.lora_B)
    after = ours._project(*given)
    assert [torch.equal(one, other) for one, other in zip(after, before, strict=True)] == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_and_weights_of_each_head(dtype):
    theirs, ours = pair({"batch_first": True}, dtype=dtype)
    given = inputs({"batch_first": True}, True, dtype)
    want, have = (m(*given, average_attn_weights=False) for m in (theirs, ours))
    assert have[1].shape == (4, 2, 3, 5)
    torch.testing.assert_close(have, want)


def test_a_row_that_sees_nothing_is_as_torchs():
    theirs, ours = pair({})
    given, padding = inputs({}, True), torch.zeros(4, 5, dtype=torch.bool)
    padding[1] = True
    for weights in (True, False):
        want, have = (m(*given, key_padding_mask=padding, need_weights=weights)[0] for m in (theirs, ours))
        torch.testing.assert_close(have, want, equal_nan=True)


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_result_can_be_viewed(batch_first):
    x = torch.randn(3, 4, 8)
    y, _ = lora.MultiheadAttention(8, 2, ["o"], r=2, batch_first=batch_first)(x, x, x)
    assert y.view(12, 8).shape == (12, 8)


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "attn_mask: got torch.uint8, expected bool", {"attn_mask": torch.zeros(3, 3, dtype=torch.uint8)}),
        (TypeError, "key_padding_mask: got torch.int64", {"key_padding_mask": torch.zeros(4, 3, dtype=torch.long)}),
        (ValueError, r"key, value: got shapes \(3, 4, 8\) and \(2, 4, 8\)", {"value": torch.randn(2, 4, 8)}),
        (ValueError, "key, value: got", {"key": torch.randn(3, 1, 8), "value": torch.randn(3, 1, 8)}),
        (ValueError, "key, value: got", {"key": torch.randn(4, 8), "value": torch.randn(4, 8)}),
        (ValueError, "query: got a nested tensor", {"query": torch.nested.nested_tensor([torch.ones(2, 8)])}),
    ],
)
def test_what_torch_refuses_is_refused_by_name(error, message, changed):
    x = torch.randn(3, 4, 8)
    given = {"query": x, "key": x, "value": x, **changed}
    with pytest.raises(error, match=message):
        lora.MultiheadAttention(8, 2, r=2)(**given)
    with pytest.raises((AssertionError, RuntimeError)):
        nn.MultiheadAttention(8, 2)(**given)


def test_a_pruned_layer_runs_but_does_not_merge():
    base = nn.MultiheadAttention(8, 2)
    prune.l1_unstructured(base, "in_proj_weight", 0.5)
    x = torch.randn(3, 4, 8)
    want = base(x, x, x)
    model = lora.inject(nn.Sequential(nn.Linear(8, 8), base), r=2)
    torch.testing.assert_close(model[1](x, x, x), want)
    with pytest.raises(ValueError, match="1: got a LoRAMultiheadAttention, which has no dense weight"):
        lora.merge(model, in_place=True)
    assert isinstance(model[0], lora.LoRALayer) and model[1].projections()


@pytest.mark.parametrize("bad", [None, "qv", [["q"]], [1], {"q": True}])
def test_bad_projections(bad):
    with pytest.raises(ValueError, match="enable_lora: got .*expected a list of 'q', 'k', 'v', 'o'"):
        lora.MultiheadAttention(8, 2, bad, r=2)
