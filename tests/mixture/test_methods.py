"""X-LoRA's methods, and the functions of its first version."""

import gc

import pytest
import torch

from fastlora import mixture
from fastlora.mixture.model import latest


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_the_log_as_peft_keeps_it(ours, peers, ids):
    mine, theirs = ours(layerwise_scalings=True).eval(), peers(layerwise_scalings=True)
    for model in (mine, theirs):
        model(input_ids=ids)
        assert model.get_scalings_log() == []
        model.enable_scalings_logging()
        for x in (ids, ids[:, :4], ids[:1], ids[:, :4]):
            model(input_ids=x)
        model.disable_scalings_logging()
        model(input_ids=ids)
    for a, b in zip(mine.get_scalings_log(), theirs.get_scalings_log(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    own, buckets = mine.get_bucketed_scalings_log(), theirs.get_bucketed_scalings_log()
    assert {n: at for n, (at, _) in own.items()} == {n: at for n, (at, _) in buckets.items()} == {9: [0, 2], 4: [1, 3]}
    assert [len(tensors) for _, tensors in own.values()] == [2, 2]
    assert not any(t.requires_grad for t in mine.get_scalings_log())
    mine.clear_scalings_log()
    assert mine.get_scalings_log() == [] and len(theirs.get_scalings_log()) == 4


@pytest.mark.parametrize("shapes", [[(2, 9)] * 3, [(2, 9), (2, 4), (1, 9), (2, 4)]])
def test_the_log_on_disk(ours, ids, tmp_path, shapes):
    model = ours(layerwise_scalings=True)
    with pytest.raises(ValueError, match="empty log"):
        model.flush_log_scalings(str(tmp_path / "log"))
    model.enable_scalings_logging()
    for batch, tokens in shapes:
        model(ids[:batch, :tokens])
    log = model.get_scalings_log()
    model.flush_log_scalings(str(tmp_path / "log"))
    assert model.get_scalings_log() == []
    again = mixture.load_scalings_log(str(tmp_path / "log"))
    assert [tuple(t.shape[:2]) for t in again] == shapes
    assert all(torch.equal(a, b) for a, b in zip(again, log, strict=True))
    model(ids)
    model.flush_log_scalings(str(tmp_path / "log"))
    assert len(mixture.load_scalings_log(str(tmp_path / "log"))) == 1


def test_latest_scalings_carry_gradients(ours, ids):
    model = ours()
    assert model.get_latest_scalings() is None
    model(ids)
    model.get_latest_scalings().square().sum().backward()
    assert model.xlora_classifier.last.weight.grad.abs().max() > 0


def test_gates_for_a_lifetime(ours, ids):
    model, gates = ours(global_scaling_weight=0.5).eval(), torch.tensor([[1.0, 0, 0], [0, 0.5, 2]])
    free = logits(model, ids)
    model.set_scalings_with_lifetime(gates, 2)
    first, second, third = (logits(model, ids) for _ in range(3))
    assert torch.equal(first, second) and torch.equal(third, free)
    assert (first - free).abs().max() > 0.1
    # a row's gates are its own
    model.set_scalings_with_lifetime(gates[1:], 1)
    torch.testing.assert_close(logits(model, ids[1:]), first[1:], rtol=1e-4, atol=1e-4)
    model.set_scalings_with_lifetime(torch.zeros(2, 3), 1)
    with model.disable_adapter():
        base = logits(model, ids)
    torch.testing.assert_close(logits(model, ids), base)


def test_a_lifetime_counts_the_steps_of_a_generation(ours, ids):
    model, gates = ours().eval(), torch.tensor([[0.0, 0, 3.0]] * 2)
    options = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        free = model.generate(ids, use_cache=True, **options)
        found = []
        for use_cache in (True, False):
            model.set_scalings_with_lifetime(gates, 6)
            found.append(model.generate(ids, use_cache=use_cache, **options))
            assert model.fixed is None
        assert torch.equal(*found) and not torch.equal(found[0], free)
        # the gates run out in the middle, and the cached scaling pass is there
        model.set_scalings_with_lifetime(gates, 3)
        model.generate(ids, use_cache=True, **options)
        assert torch.equal(model.generate(ids, use_cache=True, **options), free)


def test_a_bad_lifetime_is_refused(ours):
    model = ours()
    for value in (torch.ones(3), torch.ones(2, 4), [[1.0, 0, 0]]):
        with pytest.raises(ValueError, match=r"value: got .*, expected a tensor \(batch, 3\)"):
            model.set_scalings_with_lifetime(value, 1)
    with pytest.raises(ValueError, match="n_accesses_lifetime"):
        model.set_scalings_with_lifetime(torch.ones(2, 3), 0)


def test_switches_that_change_later(ours, ids):
    model, dense = ours().eval(), ours().eval()
    free = logits(model, ids)
    model.set_topk_lora(1)
    assert model.get_topk_lora() == 1 and (logits(model, ids) - free).abs().max() > 1e-3
    model.set_topk_lora(3)
    torch.testing.assert_close(logits(model, ids), free)
    with pytest.raises(ValueError, match="top_k_lora: got 4, expected None or an integer from 1 to 3"):
        model.set_topk_lora(4)
    model.set_topk_lora(None)
    model.set_global_scaling_weight(0.0)
    assert model.get_global_scaling_weight() == 0
    with dense.disable_adapter():
        torch.testing.assert_close(logits(model, ids), logits(dense, ids))


def test_predictions_are_printed(ours, ids, capsys):
    model = ours()
    model.print_scalings_predictions(2)
    for _ in range(3):
        model(ids)
    assert capsys.readouterr().out.count("Scaling predictions: tensor") == 2


def test_numbers_of_parameters(ours, capsys):
    model = ours(xlora_depth=2)
    trained = 32 * 16 + 16 + 16 * 3 + 3
    assert model.get_nb_trainable_parameters() == mixture.get_nb_trainable_parameters(model)
    assert model.get_nb_trainable_parameters() == (trained, sum(p.numel() for p in model.parameters()))
    model.print_trainable_parameters()
    mixture.print_trainable_parameters(model)
    assert capsys.readouterr().out.count(f"trainable params: {trained:,}") == 2


def test_functions_that_name_no_model_mean_the_last_one(ours, ids, tmp_path, capsys):
    other, model = ours(), ours().eval()
    mixture.enable_scalings_logging()
    mixture.print_scalings_predictions(1)
    mixture.set_scalings_with_lifetime(torch.zeros(2, 3), 1)
    assert latest() is model and other.fixed is None
    model(ids)
    model(ids)
    assert len(model.get_scalings_log()) == 1 and "Scaling predictions" in capsys.readouterr().out
    mixture.flush_log_scalings(str(tmp_path / "log"))
    assert len(mixture.load_scalings_log(str(tmp_path / "log"))) == 1
    model(ids)
    mixture.disable_scalings_logging()
    assert model.get_scalings_log() == []
    del other, model
    gc.collect()
    with pytest.raises(RuntimeError, match="there is no mixture yet"):
        mixture.enable_scalings_logging()


def test_the_later_versions_order_of_arguments(tiny_llama, folders, capsys):
    config = mixture.xLoRAConfig(32, "base", torch.device("cpu"), folders)
    assert isinstance(mixture.add_xlora_to_model(tiny_llama(), config, True), mixture.xLoRAModel)
    assert "3 experts on 8 layers" in capsys.readouterr().out
