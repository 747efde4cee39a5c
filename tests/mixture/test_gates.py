"""A mixture against PEFT's: the same logits and gradients, token by token, for every switch of the configuration."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora import mixture
from fastlora.nn.bank import Bank
from fastlora.nn.switch import selected

SWITCHES = {
    "default": {},
    "layerwise": {"layerwise_scalings": True},
    "deep": {"xlora_depth": 3, "layerwise_scalings": True, "xlora_dropout_p": 0.0},
    "temperature": {"softmax_temperature": 0.3},
    "logits": {"enable_softmax": False},
    "top 2": {"top_k_lora": 2, "layerwise_scalings": True},
    "top 1": {"top_k_lora": 1},
    "softmax of top 2": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    "weight": {"global_scaling_weight": 0.4},
    "pass value": {"scaling_pass_value": 0.7},
    "pass value, top 2": {"scaling_pass_value": 2.0, "top_k_lora": 2, "xlora_depth": 2},
}


@pytest.mark.parametrize("fields", SWITCHES.values(), ids=SWITCHES)
def test_logits_equal_pefts(ours, peers, ids, fields):
    mine, theirs = ours(**fields).eval(), peers(**fields)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        for inputs in ({}, {"attention_mask": mask}):
            want, got = theirs(input_ids=ids, **inputs).logits, mine(ids, **inputs).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.get_latest_scalings(), theirs.get_latest_scalings(), rtol=1e-4, atol=1e-4)
        with mine.disable_adapter():
            assert (mine(ids).logits - got).abs().max() > 0.1


def test_pass_value_none_is_one_nth(ours, peers, ids):
    mine, theirs = ours().eval(), peers()
    for model in (mine, theirs):
        model.set_scaling_pass_value(None)
    with torch.no_grad():
        torch.testing.assert_close(mine(ids).logits, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert mine.xlora_config.scaling_pass_value == pytest.approx(1 / 3)


def test_gradients_equal_pefts(ours, peers, ids):
    fields = {"layerwise_scalings": True, "xlora_depth": 2, "xlora_dropout_p": 0.0}
    mine, theirs = ours(**fields), peers(**fields)
    for model in (mine, theirs):
        model(input_ids=ids, labels=ids).loss.backward()
    want = [p.grad for p in theirs.base_model.internal_xlora_classifier.parameters()]
    for p, grad in zip(mine.xlora_classifier.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-5)
    assert all((p.grad is not None) == ("classifier" in name) for name, p in mine.named_parameters())


def test_gates_of_a_token_sum_to_one_and_are_its_own(ours, ids):
    model = ours(layerwise_scalings=True).eval()
    with torch.no_grad():
        model(ids)
    scalings = model.get_latest_scalings()
    assert scalings.shape == (2, 9, 8, 3)
    torch.testing.assert_close(scalings.sum(-1), torch.ones(2, 9, 8))
    assert scalings.std(dim=1).max() > 0.01 and scalings.std(dim=2).max() > 0.01


def test_experts_are_frozen_and_the_classifier_trains(ours, ids):
    model = ours()

    def trained():
        return {name for name, p in model.named_parameters() if p.requires_grad}

    assert trained() == {"xlora_classifier.last.weight", "xlora_classifier.last.bias"}
    model(ids)
    model.generate(ids, max_new_tokens=2, do_sample=False)
    assert trained() == {"xlora_classifier.last.weight", "xlora_classifier.last.bias"}
    model.set_use_trainable_adapters(True)
    model(ids, labels=ids).loss.backward()
    experts = [p for name, p in model.named_parameters() if ".tasks." in name]
    assert experts and all(p.grad.abs().max() > 0 for p in experts)


def test_disabled_is_the_base_model(ours, tiny_llama, ids):
    model, base = ours().eval(), tiny_llama()
    with torch.no_grad():
        want, mixed = base(ids).logits, model(ids).logits
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, want)
        assert torch.equal(model(ids).logits, mixed)
    assert torch.equal(model.remove()(ids).logits, want)


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count, self.others = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        self.count[name] = self.count.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def test_one_call_for_each_layer_whatever_the_number_of_experts(ours, folders, ids):
    counts = []
    for n in (1, 3):
        model = ours(adapters=dict(list(folders.items())[:n])).eval()
        with torch.no_grad(), _Calls() as calls:
            model(ids)
        counts.append(calls.count)
    assert counts[0]["fastlora::lora_linear"] == counts[1]["fastlora::lora_linear"] == 8
    # a layer that lacks an expert picks the gates of those it has
    assert sum(counts[1].values()) - sum(counts[0].values()) <= 8 * 6


def test_experts_add_no_copy_of_x(ours, folders):
    torch.manual_seed(0)
    peaks, x = [], torch.randn(4, 500, 48)
    for n in (1, 2):
        model = ours(adapters=dict(list(folders.items())[:n]))
        layer = next(m for name, m in model.named_modules() if name.endswith("0.mlp.down_proj") and isinstance(m, Bank))
        gates = torch.rand(4, 500, n).requires_grad_()
        activities = [torch.profiler.ProfilerActivity.CPU]
        profiled = torch.profiler.profile(profile_memory=True, activities=activities)
        with profiled as profile, selected(model.owner, model.keys, gates):
            layer(x).sum().backward()
        peaks.append(sum(max(e.self_cpu_memory_usage, 0) for e in profile.events()))
    # each expert has its z and t (batch, tokens, r), and gates, once or twice
    assert peaks[1] - peaks[0] < x.nbytes


def test_tokens_that_are_flattened_keep_their_gates(ours):
    model = ours(layerwise_scalings=False)
    layer = next(m for m in model.modules() if isinstance(m, Bank))
    x, gates = torch.randn(2, 5, 32), torch.rand(2, 5, 3)
    with torch.no_grad(), selected(model.owner, model.keys, gates):
        torch.testing.assert_close(layer(x.flatten(0, 1)), layer(x).flatten(0, 1))
        with pytest.raises(ValueError, match="2 batch rows of 5 tokens"):
            layer(x[:, :3])


@pytest.mark.parametrize("mean", [True, False])
def test_a_sequence_has_one_set_of_gates(ours, ids, mean):
    model = ours(per_token=False, use_mean_pool=mean, layerwise_scalings=True).eval()
    padded, mask = torch.cat([torch.zeros_like(ids[:, :2]), ids], 1), torch.ones(2, 11, dtype=torch.long)
    mask[:, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        plain = model(ids).logits
        scalings = model.get_latest_scalings()
        left = model(padded, attention_mask=mask, position_ids=positions).logits[:, 2:]
        alone = model(ids[1:]).logits
    assert scalings.shape == (2, 8, 3)
    torch.testing.assert_close(left, plain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(alone, plain[1:], rtol=1e-3, atol=1e-3)
    hidden = model.xlora_classifier.pool(torch.arange(6.0).view(1, 3, 2), None, None)
    assert hidden.tolist() == ([[2.0, 3.0]] if mean else [[4.0, 5.0]])


def test_a_stop_token_ends_the_sequence(ours):
    classifier = ours(per_token=False, stop_token_id=2, use_mean_pool=False).xlora_classifier
    hidden, tokens = torch.arange(8.0).view(1, 4, 2), torch.tensor([[5, 6, 2, 2]])
    assert classifier.pool(hidden, None, tokens).tolist() == [[2.0, 3.0]]
    # padding on the left may be the same token
    padded, mask = torch.tensor([[2, 2, 6, 2]]), torch.tensor([[0, 0, 1, 1]])
    assert classifier.pool(hidden, mask, padded).tolist() == [[4.0, 5.0]]


@pytest.mark.parametrize(
    "fields, name",
    [
        ({"xlora_depth": 0}, "xlora_depth"), ({"top_k_lora": 0}, "top_k_lora"),
        ({"softmax_temperature": 0}, "softmax_temperature"),
        ({"enable_softmax_topk": True}, "enable_softmax_topk"), ({"xlora_dropout_p": 1.5}, "xlora_dropout_p"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(fields, name):
    with pytest.raises(ValueError, match=name):
        mixture.xLoRAConfig(**fields)
