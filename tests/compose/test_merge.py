"""compose: the original's formula on any adapters, the exact sum, and PEFT's own merges."""

import itertools
import sys

import peft
import pytest
import torch
from torch import nn

import fastlora
from fastlora.compose import compose
from fastlora.compose.merge import PEFT_MODES

SIZES = {"base_model.model.up": (6, 10), "base_model.model.down": (10, 6)}


def adapter(seed, r=4, sizes=SIZES, end=".weight"):
    torch.manual_seed(seed)
    shapes = {f"{path}.lora_{x}{end}": (r, i) if x == "A" else (o, r) for path, (i, o) in sizes.items() for x in "AB"}
    return {key: torch.randn(shape) for key, shape in shapes.items()}


def delta(made, path):
    factors = {key.removesuffix(".weight").rpartition("_")[2]: t for key, t in made.items() if key.startswith(path)}
    return factors["B"] @ factors["A"]


@pytest.mark.parametrize("end", ["", ".weight"])
def test_lorahub_is_the_originals_formula_exactly(end):
    adapters, weights = [adapter(seed, end=end) for seed in range(3)], [0.7, -1.2, 0.3]
    made = compose(adapters, weights)
    assert list(made) == list(adapters[0])
    for key, tensor in made.items():
        assert torch.equal(tensor, weights[0] * adapters[0][key] + weights[1] * adapters[1][key]
                           + weights[2] * adapters[2][key])  # fmt: skip


def test_cross_terms_and_the_sign():
    one, other = adapter(0), adapter(1)
    path = "base_model.model.up"
    A, B = ([a[f"{path}.lora_{x}.weight"] for a in (one, other)] for x in "AB")
    both = delta(compose([one, other], [1, 1]), path)
    torch.testing.assert_close(both, sum(b @ a for a in A for b in B))
    torch.testing.assert_close(delta(compose([one, other], [1, 1], mode="sum"), path), B[0] @ A[0] + B[1] @ A[1])
    torch.testing.assert_close(delta(compose([one, other], [-1, -1]), path), both)
    torch.testing.assert_close(delta(compose([one], [0.5]), path), 0.25 * B[0] @ A[0])


def folder(path, r, lora_alpha, seed):
    torch.manual_seed(seed)
    model = fastlora.inject(nn.ModuleDict({"up": nn.Linear(6, 10), "down": nn.Linear(10, 6)}), r, lora_alpha)
    for layer in model.values():
        nn.init.normal_(layer.lora_B)
    fastlora.save_adapter(model, path)
    return model, path


def test_ranks_and_alphas_of_folders(tmp_path):
    models, folders = zip(*(folder(tmp_path / f"{r}", r, a, r) for r, a in [(2, 4), (4, 4), (3, 1)]), strict=True)
    weights = {str(path): w for path, w in zip(folders, [0.4, -0.9, 1.1], strict=True)}
    padded = [torch.zeros(4, 6), torch.zeros(10, 4)]
    exact = torch.zeros(10, 6)
    for model, weight in zip(models, weights.values(), strict=True):
        layer, scale = model["up"], model["up"].lora_alpha / model["up"].r
        padded[0][: layer.r] += weight * layer.lora_A.detach()
        padded[1][:, : layer.r] += weight * scale * layer.lora_B.detach()
        exact += weight * scale * (layer.lora_B @ layer.lora_A).detach()
    made, summed = compose(folders, weights), compose(folders, weights, mode="sum")
    path = "base_model.model.up"
    torch.testing.assert_close(made[f"{path}.lora_A.weight"], padded[0])
    torch.testing.assert_close(made[f"{path}.lora_B.weight"], padded[1])
    assert summed[f"{path}.lora_A.weight"].shape == (9, 6)
    torch.testing.assert_close(delta(summed, path), exact)
    halved = compose(folders, weights, scale=2.0)
    torch.testing.assert_close(2 * delta(halved, path), delta(made, path))


def test_equal_alphas_at_their_scale_are_the_originals_numbers(tmp_path):
    models, folders = zip(*(folder(tmp_path / f"{seed}", 4, 8, seed) for seed in range(2)), strict=True)
    made = compose(folders, [0.3, -0.8], scale=2.0)
    for x in "AB":
        own = [getattr(model["up"], f"lora_{x}").detach() for model in models]
        assert torch.equal(made[f"base_model.model.up.lora_{x}.weight"], 0.3 * own[0] + -0.8 * own[1])


def test_a_layer_that_an_adapter_lacks():
    one, other = adapter(0), adapter(1, r=2, sizes={"base_model.model.up": (6, 10)})
    made = compose([one, other], [0.5, 2])
    assert torch.equal(made["base_model.model.down.lora_A.weight"], 0.5 * one["base_model.model.down.lora_A.weight"])
    padded = torch.cat([other["base_model.model.up.lora_A.weight"], torch.zeros(2, 6)])
    expected = 0.5 * one["base_model.model.up.lora_A.weight"] + 2 * padded
    torch.testing.assert_close(made["base_model.model.up.lora_A.weight"], expected)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)


OPTIONS = {"ties": {"density": 0.4, "majority_sign_method": "frequency"}, "svd": {"svd_rank": 3}, "linear": {},
           "cat": {}, "dare_linear": {"density": 0.5}, "dare_ties": {"density": 0.5},
           "magnitude_prune": {"density": 0.3}}  # fmt: skip


@pytest.mark.parametrize("mode", PEFT_MODES)
def test_pefts_merges_are_pefts(tmp_path, mode):
    """add_weighted_adapter on a real PEFT model of both layers, with two alphas; dare_* draw, so one layer alone."""
    paths = ("up",) if mode.startswith("dare") else ("up", "down")
    alphas, weights = (8, 4), [0.7, -0.4]
    torch.manual_seed(0)
    names = ["a", "b"]
    configs = [peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=list(paths)) for alpha in alphas]
    model = peft.get_peft_model(Net(), configs[0], adapter_name="a")
    model.add_adapter("b", configs[1])
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    for name in names:
        model.save_pretrained(tmp_path, selected_adapters=[name])
    options = OPTIONS[mode.removesuffix("_svd")]
    torch.manual_seed(3)
    model.add_weighted_adapter(names, weights, "merged", combination_type=mode, **options)
    torch.manual_seed(3)
    made = compose([tmp_path / name for name in names], weights, mode=mode, **options)
    assert len(made) == 2 * len(paths)
    for path, x in itertools.product(paths, "AB"):
        expected = getattr(model.base_model.model, path).get_submodule(f"lora_{x}")["merged"].weight
        torch.testing.assert_close(made[f"base_model.model.{path}.lora_{x}.weight"], expected.detach())


def test_errors_say_what_was_expected(monkeypatch):
    one, other = adapter(0), adapter(1)
    with pytest.raises(ValueError, match="adapters: got none, expected at least one"):
        compose([], [])
    with pytest.raises(ValueError, match="weights: got 1 numbers, expected 2"):
        compose([one, other], [1.0])
    with pytest.raises(ValueError, match=r"weights: got names \['a'\], expected \['a', 'b'\]"):
        compose({"a": one, "b": other}, {"a": 1})
    with pytest.raises(ValueError, match="weights: got .*nan.*, expected finite"):
        compose([one], [float("nan")])
    with pytest.raises(ValueError, match="mode: got 'mean', expected one of lorahub, sum, linear"):
        compose([one], [1], mode="mean")
    with pytest.raises(ValueError, match="adapters: got x twice"):
        compose(["x", "y", "x"], [1, 1, 1])
    with pytest.raises(ValueError, match=r"adapters\['adapters\[1\]'\]: got layers such as 'fc'"):
        compose([one, adapter(1, sizes={"fc": (6, 10)})], [1, 1])
    with pytest.raises(ValueError, match=r"got sizes \(\(6,\), \(11,\)\) at 'up', expected \(\(6,\), \(10,\)\)"):
        compose([one, adapter(1, sizes={"up": (6, 11)})], [1, 1])
    with pytest.raises(ValueError, match="tensor 'up.bias', expected lora_A and lora_B alone"):
        compose([{**one, "up.bias": torch.zeros(10)}], [1])
    with pytest.raises(ValueError, match="lora_A alone at 'up'"):
        compose([{"up.lora_A": torch.zeros(2, 6)}], [1])
    with pytest.raises(ValueError, match="density: got None"):
        compose([one, other], [1, 1], mode="ties")
    with pytest.raises(ValueError, match=r"options: got \['density'\]"):
        compose([one, other], [1, 1], density=0.5)
    with pytest.raises(FileNotFoundError):
        compose(["nowhere"], [1])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="'svd' needs PEFT: pip install peft"):
        compose([one, other], [1, 1], mode="svd")
