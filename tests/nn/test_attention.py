"""MultiheadAttention: torch's results for all of torch's options, and a delta on what is enabled alone."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn

import fastlora as lora

OPTIONS = [
    {},
    {"batch_first": True},
    {"kdim": 5, "vdim": 7, "batch_first": True},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "bias": False},
]


def pair(options, enable_lora=("q", "k", "v", "o"), dtype=torch.float32):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, dtype=dtype, **options)
    torch.manual_seed(0)
    ours = lora.MultiheadAttention(8, 2, list(enable_lora), r=2, lora_alpha=4, dtype=dtype, **options)
    return theirs, ours


def shapes(module):
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def wake(attention):
    torch.manual_seed(1)
    for projection in attention.projections().values():
        nn.init.normal_(projection.lora_B)
    return attention


def inputs(options, dtype=torch.float32):
    torch.manual_seed(2)
    batch_first = options.get("batch_first", False)
    made = []
    for length, size in ((3, 8), (5, options.get("kdim", 8)), (5, options.get("vdim", 8))):
        made.append(torch.randn(*((4, length) if batch_first else (length, 4)), size, dtype=dtype))
    return made


def masks():
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[0, -2:] = padding[2, 0] = True
    flat, each = torch.zeros(3, 5, dtype=torch.bool), torch.zeros(8, 3, 5)
    flat[0, 3:] = True
    each[1, :, 2] = -1.5
    return itertools.product((None, padding), (None, flat, flat.float() * -9, each))


@pytest.mark.parametrize("options", OPTIONS)
def test_torchs_results_for_torchs_options(options):
    theirs, ours = pair(options)
    assert shapes(theirs).items() <= shapes(ours).items()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    given = inputs(options)
    for padding, mask in masks():
        for weights, average in ((True, True), (True, False), (False, True)):
            kw = {"key_padding_mask": padding, "attn_mask": mask}
            kw |= {"need_weights": weights, "average_attn_weights": average}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                want = theirs(*given, **kw)
            have = ours(*given, **kw)
            torch.testing.assert_close(have[0], want[0])
            assert (have[1] is None) == (want[1] is None)
            if weights:
                torch.testing.assert_close(have[1], want[1])


def test_without_a_batch_and_causal():
    theirs, ours = pair({})
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(5, 8)
    mask, padding = torch.ones(5, 5).triu(1).bool(), torch.tensor([False] * 4 + [True])
    for kw in ({}, {"attn_mask": mask, "is_causal": True}, {"key_padding_mask": padding}):
        for weights in (True, False):
            have, want = (m(x, x, x, need_weights=weights, **kw) for m in (ours, theirs))
            torch.testing.assert_close(have[0], want[0])
            if weights:
                torch.testing.assert_close(have[1], want[1])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("enable_lora", ["qv", "k", "o", "qkvo"])
def test_the_delta_is_confined_to_what_is_enabled(options, enable_lora):
    """loratorch's ["q", "v"] changes k too, and its ["o"] makes adapters on the input."""
    theirs, ours = pair(options, enable_lora)
    wake(ours)
    assert {n for n in ours.state_dict() if "lora" in n} == {f"lora_{e}.lora_{x}" for e in enable_lora for x in "AB"}
    weights = {name: w.detach().clone() for name, w in ours.projection_weights().items()}
    for name, projection in ours.projections().items():
        weights[name] += 2.0 * projection.lora_B @ projection.lora_A
    with torch.no_grad():
        theirs.load_state_dict({n: t for n, t in ours.state_dict().items() if "lora" not in n})
        for name, weight in theirs.named_parameters():
            if name == "in_proj_weight":
                weight.copy_(torch.cat([weights[n] for n in "qkv"]))
            elif name.removesuffix("_proj_weight") in "qkv" or name == "out_proj.weight":
                weight.copy_(weights["o" if name.startswith("out") else name[0]])
    given = inputs(options)
    torch.testing.assert_close(ours(*given), theirs(*given))
    exported = lora.merge_and_export(ours)
    assert type(exported) is nn.MultiheadAttention and type(ours) is lora.MultiheadAttention
    assert shapes(exported) == shapes(theirs)
    torch.testing.assert_close(exported(*given), theirs(*given))


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_in_float64(options):
    _, ours = pair(options, dtype=torch.float64)
    wake(ours)
    given = [t.requires_grad_() for t in inputs(options, torch.float64)]
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[1, 3:] = True
    trained = [p for p in ours.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(
        lambda q, k, v, *_: ours(q, k, v, key_padding_mask=padding), (*given, *trained), fast_mode=True
    )


def test_what_is_trained():
    _, ours = pair({}, "qo")
    named = dict(ours.named_parameters())
    assert not named["in_proj_weight"].requires_grad and not named["out_proj.weight"].requires_grad
    lora.mark_only_lora_as_trainable(ours)
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert trained == {f"lora_{e}.lora_{x}" for e in "qo" for x in "AB"}
    apart = pair({"kdim": 5, "vdim": 7}, "k")[1]
    assert [n for n, p in apart.named_parameters() if not p.requires_grad] == ["k_proj_weight"]


MODELS = {
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2),
    "decoder": lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, 0.0), 2),
    "transformer": lambda: nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_in_torchs_transformers(name, training):
    torch.manual_seed(0)
    model = MODELS[name]().train(training)
    given = (torch.randn(3, 4, 8),) * (1 if name == "encoder" else 2)
    before = model(*given)
    lora.inject(model, r=2, lora_alpha=4)
    torch.testing.assert_close(model(*given), before)
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    assert all(list(m.projections()) == list("qkvo") for m in attentions)
    [wake(m) for m in attentions]
    after = model(*given)
    assert not torch.allclose(after, before, atol=0.01)
    with torch.no_grad():
        torch.testing.assert_close(model(*given), after)
        torch.testing.assert_close(lora.merge_and_export(model)(*given), after, rtol=1e-4, atol=1e-4)
        with lora.disable_adapter(model):
            torch.testing.assert_close(model(*given), before)
    after.sum().backward()
    assert all(p.grad is not None for m in attentions for p in m.projections()["q"].parameters())
    lora.remove(model)
    torch.testing.assert_close(model(*given), before)
    assert [type(m) for m in model.modules()] == [type(m) for m in MODELS[name]().modules()]


def test_an_attention_put_into_an_encoder_by_hand_is_used_in_eval_mode():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    layer.self_attn = wake(lora.MultiheadAttention(8, 2, ["v"], r=2, batch_first=True)).eval()
    x = torch.randn(3, 4, 8)
    with torch.no_grad():
        fast = layer(x)
    torch.testing.assert_close(fast, layer(x))
    with lora.disable_adapter(layer):
        assert not torch.allclose(layer(x), fast, atol=0.01)


def test_dropout_of_the_weights_and_of_the_adapter():
    x = torch.randn(3, 4, 8)
    plain = wake(lora.MultiheadAttention(8, 2, r=2, dropout=0.5))
    assert not torch.allclose(plain(x, x, x)[0], plain(x, x, x)[0])
    assert torch.equal(plain.eval()(x, x, x)[0], plain(x, x, x)[0])
    adapter = wake(lora.MultiheadAttention(8, 2, ["v"], r=2, lora_dropout=1.0))
    base = nn.MultiheadAttention(8, 2)
    base.load_state_dict({n: t for n, t in adapter.state_dict().items() if "lora" not in n})
    torch.testing.assert_close(adapter(x, x, x), base(x, x, x))
    assert not torch.allclose(adapter.eval()(x, x, x)[0], base(x, x, x)[0])


def test_copies_compile_and_half_precision():
    _, ours = pair({"batch_first": True}, "qv")
    wake(ours)
    x = torch.randn(3, 4, 8)
    y = ours(x, x, x)[0]
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x, x, x)[0], y)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x, x)[0], y)
    half = copy.deepcopy(ours).bfloat16()(x.bfloat16(), x.bfloat16(), x.bfloat16())[0]
    torch.testing.assert_close(half.float(), y, rtol=0.05, atol=0.1)
    mixed = nn.Sequential(nn.MultiheadAttention(8, 2)).bfloat16()
    lora.inject(mixed, r=2)
    assert mixed[0].lora_q.lora_A.dtype == torch.float32
    assert mixed[0](*[x.bfloat16()] * 3)[0].dtype == torch.bfloat16


def test_bad_arguments():
    for bad in ("qv", ["q", "x"], [True, False]):
        with pytest.raises(ValueError, match="enable_lora: got .*expected a list of 'q', 'k', 'v', 'o'"):
            lora.MultiheadAttention(8, 2, bad, r=2)
    _, ours = pair({})
    x = torch.randn(3, 4, 8)
    for kw, message in (
        ({"attn_mask": torch.zeros(2, 2)}, r"attn_mask: got \(2, 2\), expected \(3, 3\) or \(8, 3, 3\)"),
        ({"key_padding_mask": torch.zeros(3, 4)}, r"key_padding_mask: got \(3, 4\), expected \(4, 3\)"),
        ({"is_causal": True}, "attn_mask: got None"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(x, x, x, **kw)
    with pytest.raises(ValueError, match="query: got shape"):
        ours(x[None], x[None], x[None])
    none = lora.MultiheadAttention(8, 2, ["q"])
    assert not none.projections() and none.in_proj_weight.requires_grad
