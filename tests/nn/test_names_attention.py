"""One adapter for q, k and v, as loratorch and PEFT have it, and one for each, as here."""

import itertools

import pytest
import torch
from torch import nn

import fastlora
from fastlora import tasks
from fastlora.nn import names

E = 8
# names of loratorch's attention layer in every choice of projections
CHOICES = ["".join(c) for n in range(1, 5) for c in itertools.combinations("qkvo", n)]


def attention(enabled="qkvo", r=2, **kwargs):
    torch.manual_seed(0)
    layer = fastlora.MultiheadAttention(E, 2, enable_lora=list(enabled), r=r, lora_alpha=3, **kwargs)
    for projection in layer.projections().values():
        nn.init.normal_(projection.lora_B)
    return layer


def base_of(layer):
    return {name: tensor for name, tensor in layer.state_dict().items() if "lora_" not in name}


def joint(letters, r=2):
    """loratorch's tensors for these letters, of which it leaves out nothing: B has rows for k although k is off."""
    torch.manual_seed(1)
    stored = {f"{letters}_lora_A": torch.randn(r, E), f"{letters}_lora_B": torch.randn(3 * E, r)}
    for name, rows in zip("qkv", stored[f"{letters}_lora_B"].chunk(3), strict=True):
        if name not in letters:
            rows.zero_()
    return stored


def weights(layer):
    """{projection: W + ΔW}"""
    base = layer.projection_weights()
    return {n: base[n] + p.update(*p.adapters()) for n, p in layer.projections().items()}


@pytest.mark.parametrize("letters", ["qkv", "qv", "k", "kv"])
def test_loratorch_joint_adapter_is_split_exactly(letters):
    layer = attention(letters + "o")
    stored = {**base_of(layer), **joint(letters), "o_lora_A": torch.randn(2, E), "o_lora_B": torch.randn(E, 2)}
    assert layer.load_state_dict(stored) == ([], [])
    A, B = stored[f"{letters}_lora_A"], stored[f"{letters}_lora_B"]
    whole = layer.in_proj_weight + 1.5 * B @ A
    got = weights(layer)
    for name, rows in zip("qkv", whole.chunk(3), strict=True):
        if name in letters:
            torch.testing.assert_close(got[name], rows)
    torch.testing.assert_close(got["o"], layer.out_proj.weight + 1.5 * stored["o_lora_B"] @ stored["o_lora_A"])
    written = names.write(layer, "loratorch")
    assert {name: stored[name] for name in written}.keys() == stored.keys() - base_of(layer).keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in written.items())


@pytest.mark.parametrize("dialect", ["loratorch", "peft", "tasks", "fastlora"])
@pytest.mark.parametrize("enabled", CHOICES)
def test_round_trips_are_exact(enabled, dialect):
    layer, again = attention(enabled), attention(enabled)
    for projection in layer.projections().values():
        projection.lora_alpha = 2
    written = names.write(layer, dialect)
    for projection in again.projections().values():
        nn.init.zeros_(projection.lora_B)
    assert again.load_state_dict({**base_of(layer), **written}) == ([], [])
    for name, tensor in layer.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("enabled", ["qkv", "qv", "v"])
def test_differing_lora_A_are_stacked(enabled):
    layer = attention(enabled)
    written = names.write(layer, "loratorch")
    groups = len(enabled)
    A, B = written[f"{enabled}_lora_A"], written[f"{enabled}_lora_B"]
    assert A.shape == (2 * groups, E) and B.shape == (3 * E, 2 * groups)
    # lora_alpha scaled by the number of projections
    whole = layer.in_proj_weight + 3 * groups / (2 * groups) * B @ A
    for name, rows in zip("qkv", whole.chunk(3), strict=True):
        torch.testing.assert_close(weights(layer).get(name, layer.projection_weights()[name]), rows)


def test_loratorch_does_not_confine_its_adapter_and_that_is_said():
    layer = attention("qv")
    stored = joint("qv")
    assert layer.load_state_dict(stored, strict=False).unexpected_keys == []
    stored["qv_lora_B"][E : 2 * E] = 0.1
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(ValueError, match=r"that changes k, expected 'k' in enable_lora, here \['q', 'v'\]"):
        layer.load_state_dict(stored, strict=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    # all three are enabled here: it is three adapters
    assert attention("qkv").load_state_dict(stored, strict=False).unexpected_keys == []


def test_loratorch_leaves_an_empty_adapter_beside_o():
    layer = attention("o")
    stored = {"_lora_A": torch.zeros(2, E), "_lora_B": torch.zeros(3 * E, 2)}
    stored.update(o_lora_A=torch.randn(2, E), o_lora_B=torch.randn(E, 2))
    assert layer.load_state_dict({**base_of(layer), **stored}) == ([], [])
    assert torch.equal(layer.lora_o.lora_A, stored["o_lora_A"])


def test_loratorch_with_sizes_of_their_own():
    layer = attention("qkvo", kdim=5, vdim=6)
    sizes = {"q": E, "k": 5, "v": 6, "o": E}
    stored = {f"{n}_lora_{x}": torch.randn(s) for n, i in sizes.items() for x, s in (("A", (2, i)), ("B", (E, 2)))}
    assert layer.load_state_dict({**base_of(layer), **stored}) == ([], [])
    assert torch.equal(layer.lora_k.lora_A, stored["k_lora_A"])
    written = names.write(layer, "loratorch")
    assert written.keys() == stored.keys() and all(torch.equal(t, stored[n]) for n, t in written.items())
    with pytest.raises(ValueError, match="attn: got kdim or vdim"):
        names.write(layer, "peft", "attn")


def test_one_projection_joint_or_alone():
    """q_lora_B has 3E rows in a layer of equal sizes and E in the others."""
    for rows in (E, 3 * E):
        layer = attention("q")
        stored = {"q_lora_A": torch.randn(2, E), "q_lora_B": torch.randn(rows, 2)}
        stored["q_lora_B"][E:] = 0
        assert layer.load_state_dict({**base_of(layer), **stored}) == ([], [])
        assert torch.equal(layer.lora_q.lora_B, stored["q_lora_B"][:E])


def test_assigned_parameters_share_no_memory():
    layer = attention("qkv")
    layer.load_state_dict({**base_of(layer), **joint("qkv")}, assign=True)
    ends = [(p.lora_A.data_ptr(), p.lora_B.untyped_storage().data_ptr()) for p in layer.projections().values()]
    assert len(set(itertools.chain(*ends))) == 6


def test_wrong_ranks_and_halves_of_an_adapter_are_reported():
    layer = attention("qkv")
    with pytest.raises(RuntimeError, match="size mismatch for lora_q.lora_A"):
        layer.load_state_dict({**base_of(layer), **joint("qkv", r=3)})
    half = {"qkv_lora_A": torch.randn(2, E)}
    missing, unexpected = layer.load_state_dict({**base_of(layer), **half}, strict=False)
    assert unexpected == ["qkv_lora_A"] and "lora_k.lora_A" in missing
    with pytest.raises(ValueError, match="changes v"):
        attention("qk").load_state_dict(joint("qkv"), strict=False)
    unwanted = {"o_lora_A": torch.randn(2, E), "o_lora_B": torch.randn(E, 2)}
    assert layer.load_state_dict(unwanted, strict=False).unexpected_keys == ["lora_o.lora_A", "lora_o.lora_B"]


def test_a_stack_is_one_only_with_zeros_beside_its_blocks():
    """Of rank 6: three stacked adapters of rank 2, or one that a layer of rank 2 has no room for."""
    layer, dense = attention("qkv"), joint("qkv", r=6)
    with pytest.raises(RuntimeError, match=r"size mismatch for lora_q.lora_A: .*\[6, 8\]"):
        layer.load_state_dict({**base_of(layer), **dense})
    A, B = dense.values()
    stack = torch.block_diag(*(part[:, 2 * i : 2 * i + 2] for i, part in enumerate(B.chunk(3))))
    assert layer.load_state_dict({**base_of(layer), "qkv_lora_A": A, "qkv_lora_B": stack}) == ([], [])
    assert torch.equal(layer.lora_k.lora_A, A[2:4]) and torch.equal(layer.lora_k.lora_B, stack[E : 2 * E, 2:4])
    # a plain layer's rank is found in the file, where the output projection's allows it
    plain = nn.MultiheadAttention(E, 2)
    for rank, beyond in ((2, 0.0), (6, 1.0)):
        out_A, out_B = torch.randn(6, E), torch.randn(E, 6)
        out_B[:, 2:] *= beyond
        stored = {"lora_A": A, "lora_B": stack, "out_proj.lora_A": out_A, "out_proj.lora_B": out_B}
        found = names.read(plain, stored, "attention")
        assert {len(found[f"lora_{n}.lora_A"]) for n in "qkvo"} == {rank}
        for name, rows in zip("qkv", (stack @ A).chunk(3), strict=True):
            torch.testing.assert_close(found[f"lora_{name}.lora_B"] @ found[f"lora_{name}.lora_A"], rows)


def test_layers_with_named_tasks_leave_tasks_names_alone():
    model = tasks.Model(nn.Sequential(nn.Linear(E, E), nn.MultiheadAttention(E, 2))).add_task("a").add_task("b")
    stored = {"0.a.module.A": torch.ones(E, 2), "0.b.module.A": torch.ones(E, 2), "0.module.bias": torch.ones(E)}
    stored.update({f"1.{name}": tensor for name, tensor in joint("qkv").items()})
    _, unexpected = model.model.load_state_dict(stored, strict=False)
    assert unexpected == ["0.a.module.A", "0.b.module.A", "1.qkv_lora_A", "1.qkv_lora_B"]
    assert model.model[0].bias.eq(1).all()


def test_projections_of_several_ranks_have_no_joint_adapter():
    layer = attention("qv")
    layer.lora_v.lora_alpha = 7
    for dialect in ("loratorch", "peft"):
        with pytest.raises(ValueError, match="attn: got projections of several ranks or lora_alpha"):
            names.write(layer, dialect, "attn")
