"""Generation with the KV cache is generation without; the scaling pass's half of a cache follows what is done to it."""

import copy
import inspect
import warnings

import pytest
import torch

GREEDY = {"max_new_tokens": 10, "do_sample": False}
WAYS = {
    "greedy": GREEDY,
    "beams": {**GREEDY, "num_beams": 3, "num_return_sequences": 2},
    "sampling": {"max_new_tokens": 10, "do_sample": True, "num_return_sequences": 3, "top_k": 5},
    "static": {**GREEDY, "cache_implementation": "static"},
    "in chunks": {**GREEDY, "prefill_chunk_size": 4},
}
FIELDS = {
    "default": {"layerwise_scalings": True},
    "pass value": {"scaling_pass_value": 0.5},
    "top 1": {"top_k_lora": 1, "xlora_depth": 2},
}


def cache_of(output):
    return output.cache if "cache" in output else output.past_key_values


def step(model, ids, cache=None):
    """(logits, cache); transformers renames the argument."""
    given = {} if cache is None else {name_of_cache(model): cache}
    with torch.no_grad():
        output = model(ids, use_cache=True, **given)
    return output.logits, cache_of(output)


def name_of_cache(model):
    return "cache" if "cache" in inspect.signature(model.model.forward).parameters else "past_key_values"


def generate(model, *args, **kwargs):
    torch.manual_seed(11)
    with torch.no_grad():
        return model.generate(*args, **kwargs)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_cached_generation_is_the_uncached_one(ours, ids, fields, way):
    model = ours(**fields).eval()
    of_the_cache = ("cache_implementation", "prefill_chunk_size")
    uncached = {name: value for name, value in way.items() if name not in of_the_cache}
    want = generate(model, ids, use_cache=False, **uncached)
    assert torch.equal(generate(model, ids, use_cache=True, **way), want)
    with model.disable_adapter():
        assert not torch.equal(generate(model, ids, use_cache=True, **way), want)


def test_left_padding(ours, ids):
    model = ours(layerwise_scalings=True).eval()
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids], 1)
    want = generate(model, ids, use_cache=True, **GREEDY)
    mask = (padded != 0).long()
    got = generate(model, padded, attention_mask=mask, use_cache=True, **GREEDY)
    assert torch.equal(got[:, 4:], want)


def test_each_step_runs_on_new_tokens_only(ours, ids):
    model = ours().eval()
    lengths = []
    model.model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    generate(model, ids, use_cache=True, max_new_tokens=3, do_sample=False)
    assert lengths == [9, 9, 1, 1, 1, 1]


def test_a_loop_of_ones_own_and_two_that_interleave(ours, ids):
    model = ours(layerwise_scalings=True).eval()
    others = ids.flip(1)
    with torch.no_grad():
        want = [model(x).logits for x in (ids, others)]
    first, a = step(model, ids[:, :4])
    other, b = step(model, others[:, :6])
    second, a = step(model, ids[:, 4:6], a)
    fourth, b = step(model, others[:, 6:], b)
    third, a = step(model, ids[:, 6:], a)
    torch.testing.assert_close(torch.cat([first, second, third], 1), want[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([other, fourth], 1), want[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_the_cache_follows(ours, ids, value):
    """Copied, cropped, reordered, repeated, selected from and reset, the cache gives what a full forward gives."""
    model = ours(layerwise_scalings=True, scaling_pass_value=value).eval()
    with torch.no_grad():
        full = model(ids).logits
    _, cache = step(model, ids[:, :7])

    def check(cache, rows, start=7):
        got, _ = step(model, ids[rows, start:], cache)
        torch.testing.assert_close(got, full[rows, start:], rtol=1e-4, atol=1e-4)

    check(copy.deepcopy(cache), [0, 1])
    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    check(swapped, [1, 0])
    cut = copy.deepcopy(cache)
    cut.crop(-3)
    check(cut, [0, 1], start=4)
    more = copy.deepcopy(cache)
    more.batch_repeat_interleave(2)
    check(more, [0, 0, 1, 1])
    one = copy.deepcopy(cache)
    one.batch_select_indices(torch.tensor([1]))
    check(one, [1])
    cache.reset()
    assert cache.get_seq_length() == 0
    check(cache, [0, 1], start=0)


def test_a_cache_without_a_scaling_pass_is_refused(ours, tiny_llama, ids):
    model = ours().eval()
    with model.disable_adapter():
        _, cache = step(model, ids[:, :5])
    with pytest.raises(ValueError, match="past_key_values: got a cache of 5 tokens with no scaling pass"):
        step(model, ids[:, 5:], cache)
    _, cache = step(model, ids[:, :5])
    with model.disable_adapter():
        _, cache = step(model, ids[:, 5:7], cache)
    with pytest.raises(ValueError, match="a cache of 7 tokens with a scaling pass over 5"):
        step(model, ids[:, 7:], cache)
    _, cache = step(model, ids[:, :5])
    model.set_scaling_pass_value(0.5)
    with pytest.raises(ValueError, match="scaling_pass_value 0.5"):
        step(model, ids[:, 5:], cache)
    # top_k_lora and the like hold in a pass with experts too, and another mixture's keys are another's
    _, cache = step(model, ids[:, :5])
    model.set_topk_lora(1)
    for other in (model, ours(scaling_pass_value=0.5).eval()):
        with pytest.raises(ValueError, match="that this mixture has filled"):
            step(other, ids[:, 5:], cache)
    # and the model is not the worse for it
    model.set_scaling_pass_value(0)
    with torch.no_grad():
        torch.testing.assert_close(step(model, ids)[0], model(ids).logits)


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("way", ["prompt_lookup_num_tokens", "assistant_model"])
def test_assisted_decoding_cuts_both_halves_of_the_cache(ours, tiny_llama, ids, way, fields):
    model, drafts = ours(**fields).eval(), []
    for one in (ids[:1], ids[1:], ids[:1, :5].repeat(1, 4)):
        want = generate(model, one, max_new_tokens=16, do_sample=False, use_cache=False)
        hook = model.model.model.register_forward_pre_hook(
            lambda _, args, kwargs: drafts.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        assistant = {way: 3 if way == "prompt_lookup_num_tokens" else tiny_llama()}
        got = generate(model, one, max_new_tokens=16, do_sample=False, use_cache=True, **assistant)
        hook.remove()
        assert torch.equal(got, want)
    # candidates were checked together, and not all were right
    assert any(1 < n < 5 for n in drafts)


def test_gates_of_a_sequence_switch_the_cache_off_aloud(ours, ids):
    model, pooled = ours().eval(), ours(per_token=False).eval()
    with pytest.warns(UserWarning, match="use_cache is switched off"):
        got = generate(pooled, ids, **GREEDY, use_cache=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        want = generate(pooled, ids, **GREEDY, use_cache=False)
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="gates of a whole sequence"):
        step(pooled, ids, step(model, ids)[1])


def test_bfloat16(ours, tiny_llama, ids):
    model = ours(model=tiny_llama().bfloat16()).eval()
    with torch.no_grad():
        full = model(ids).logits
    first, cache = step(model, ids[:, :6])
    second, _ = step(model, ids[:, 6:], cache)
    torch.testing.assert_close(torch.cat([first, second], 1), full, rtol=0.05, atol=0.05)
    assert model.xlora_classifier.last.weight.dtype == torch.bfloat16
