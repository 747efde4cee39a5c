"""Embedding: parity with the real loralib, rows alone, padding, dropout of whole tokens."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastlora as lora

loralib = pytest.importorskip("loralib")
ARGUMENTS = [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}, {"padding_idx": 0, "dtype": torch.float64}]
IDS = torch.tensor([[1, 3, 3, 0], [5, 1, 8, 3]])


def pair(**arguments):
    layers = []
    for library in (loralib, lora):
        torch.manual_seed(0)
        layer = library.Embedding(9, 6, r=2, lora_alpha=5, **arguments)
        layers.append(layer)
    return layers


def wake(*layers):
    for layer in layers:
        torch.manual_seed(1)
        nn.init.normal_(layer.lora_A)


def test_behaviour_01_embedding_init_is_reversed():
    """lora_A zero, lora_B normal."""
    theirs, ours = pair()
    assert all(torch.equal(t, theirs.state_dict()[n]) for n, t in ours.state_dict().items())
    assert ours.lora_A.eq(0).all() and ours.lora_B.std() > 0.3


def test_behaviour_02_embedding_layout():
    """loralib's lora_A (r, V), lora_B (D, r)."""
    _, ours = pair()
    assert ours.lora_A.shape == (2, 9) and ours.lora_B.shape == (6, 2)


def test_behaviour_04_default_alpha_is_one():
    assert float(lora.Embedding(9, 6, r=4).scaling) == 0.25 == loralib.Embedding(9, 6, r=4).scaling


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_as_loralib(arguments):
    theirs, ours = pair(**arguments)
    wake(theirs, ours)
    dy = torch.randn(2, 4, 6, dtype=arguments.get("dtype"))
    found = []
    for layer in (theirs, ours):
        y = layer(IDS)
        found.append([y, *torch.autograd.grad(y, [layer.lora_A, layer.lora_B], dy)])
    for have, expected in zip(*reversed(found), strict=True):
        torch.testing.assert_close(have, expected)
    theirs.eval(), ours.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), theirs(IDS))
    assert ours.merged


@pytest.mark.parametrize("arguments", [{}, {"padding_idx": 7}])
def test_gradients_in_float64(arguments):
    layer = lora.Embedding(9, 6, r=2, dtype=torch.float64, **arguments)
    wake(layer)
    layer.weight.requires_grad = True
    assert torch.autograd.gradcheck(lambda *_: layer(IDS), list(layer.parameters()), fast_mode=True)


def test_the_padding_row_stays_in_training():
    _, layer = pair(padding_idx=3)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=1.0)
    layer(IDS).square().sum().backward()
    optimizer.step()
    assert layer.lora_A[:, 3].eq(0).all() and layer.lora_A[:, 1].ne(0).any()
    assert layer(torch.tensor([3])).eq(0).all()


def test_only_the_rows_that_are_asked_for():
    layer = lora.Embedding(1000, 32, r=2)
    wake(layer)
    with torch.profiler.profile(profile_memory=True) as made:
        layer(IDS).sum().backward()
    # in bytes; lora_A's gradient is as large as lora_A; nothing is as large as W, or a copy of it
    assert max(event.self_cpu_memory_usage for event in made.events()) == 2 * 1000 * 4
    touched = layer.lora_A.grad.ne(0).any(0).nonzero().flatten()
    assert touched.tolist() == IDS.unique().tolist()


def test_a_sparse_embedding_trains():
    """loralib's backward raises: a transposed view has no sparse gradient."""
    plain, sparse = pair()[1], pair(sparse=True)[1]
    wake(plain, sparse)
    for layer in (plain, sparse):
        layer(IDS).square().sum().backward()
    assert torch.equal(sparse.lora_A.grad, plain.lora_A.grad)


def test_dropout_drops_a_tokens_whole_update():
    torch.manual_seed(0)
    layer = lora.Embedding(9, 6, r=2, lora_dropout=0.5)
    wake(layer)
    ids = torch.arange(9).repeat(20)
    base = nn.functional.embedding(ids, layer.weight)
    full = (layer.eval()(ids) - base).detach()
    y = layer.train()(ids)
    kept = torch.isclose(y - base, 2 * full, atol=1e-5).all(-1)
    dropped = torch.isclose(y, base).all(-1)
    assert (kept | dropped).all() and 40 < kept.sum() < 140
    y.sum().backward()
    want = torch.zeros(9).index_add(0, ids, kept.float()) * 2 * layer.scaling
    torch.testing.assert_close(layer.lora_A.grad, layer.lora_B.sum(0)[:, None] * want)


def test_max_norm_is_refused_and_plain_at_rank_zero():
    with pytest.raises(ValueError, match="max_norm: got 1.0, expected None"):
        lora.Embedding(9, 6, r=2, max_norm=1.0)
    plain = lora.Embedding(9, 6, max_norm=0.1)
    assert plain(IDS).norm(dim=-1).max() < 0.1001
    model = nn.Sequential(nn.Embedding(9, 6, max_norm=1.0))
    with pytest.raises(ValueError, match="max_norm"):
        lora.inject(model, target_modules=["0"])
    assert type(model[0]) is nn.Embedding


def test_copies_export_and_compile():
    _, layer = pair()
    wake(layer)
    y = layer(IDS)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(IDS), y)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(IDS), y)
    exported = lora.merge_and_export(layer)
    assert type(exported) is nn.Embedding and type(layer) is lora.Embedding
    torch.testing.assert_close(exported(IDS), y)
    half = copy.deepcopy(layer).bfloat16()
    assert half(IDS).dtype == torch.bfloat16 and float(half.scaling) == 2.5
    torch.testing.assert_close(half(IDS).float(), y, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("r", [0, 2])
def test_a_given_weight_stays(r):
    """loralib draws over it, in the tensor that was given."""
    weight = torch.randn(9, 6, dtype=torch.float64)
    before = weight.clone()
    layer = lora.Embedding(9, 6, r=r, _weight=weight)
    assert torch.equal(weight, before) and torch.equal(layer.weight, before)
    assert layer.weight.requires_grad == (r == 0) and layer(IDS).dtype == torch.float64
    frozen = lora.Embedding.from_pretrained(weight)
    assert torch.equal(frozen.weight, before) and not frozen.weight.requires_grad


def test_ids_of_any_shape_and_size():
    layer = pair()[1]
    wake(layer)
    y = layer(IDS)
    torch.testing.assert_close(layer(IDS[0, 0]), y[0, 0])
    torch.testing.assert_close(layer(IDS.int().T), y.transpose(0, 1))
    assert layer(IDS[:0]).shape == (0, 4, 6)


@pytest.mark.parametrize("bad", [{"r": -1}, {"r": 1.5}, {"lora_alpha": float("nan")}, {"lora_dropout": 1.5}])
def test_bad_arguments(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name}: got"):
        lora.Embedding(9, 6, **{"r": 2, **bad})
