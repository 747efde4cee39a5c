"""DyLoRA's own numbers at r = 3 and lora_alpha = 6, written down; and the layers that its package breaks."""

import pytest
import torch

from fastlora import dynamic as lora

X = torch.tensor([[1.0, 2.0], [2.0, 3.0]])
# by rank index: y; the gradients of y.sum() for the rows of lora_A, and for the entries of either row of lora_B
NUMBERS = {
    0: ([[33.5, -56.5], [53.5, -90.5]], [[-18, -30], [0, 0], [0, 0]], [78, 0, 0]),
    1: ([[18.5, -17.5], [29.5, -15.5]], [[-9, -15], [27, 45], [0, 0]], [39, 12, 0]),
    2: ([[37.5, 1.5], [53.5, 7.5]], [[-6, -10], [18, 30], [18, 30]], [26, 8, 28]),
}


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("index", NUMBERS)
def test_its_numbers(index, frozen, fan_in_fan_out):
    layer = lora.Linear(2, 2, r=3, lora_alpha=6, fan_in_fan_out=fan_in_fan_out)
    weight = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    state = {
        "weight": weight.T if fan_in_fan_out else weight,
        "bias": torch.tensor([0.5, -0.5]),
        "lora_A": torch.tensor([[1.0, 2.0], [3.0, -1.0], [-2.0, 4.0]]),
        "lora_B": torch.tensor([[1.0, 0.0, 2.0], [-2.0, 3.0, 1.0]]),
    }
    layer.load_state_dict(state)
    layer.set_rank(index, frozen)
    y, a, b = (torch.tensor(t, dtype=torch.float32) for t in NUMBERS[index])
    found = layer(X)
    torch.testing.assert_close(found, y)
    found.sum().backward()
    lives = torch.tensor([float(k == index or not frozen) for k in range(3)])
    torch.testing.assert_close(layer.lora_A.grad, a * lives[:, None])
    torch.testing.assert_close(layer.lora_B.grad, (b * lives).expand(2, 3))
    layer.eval()
    torch.testing.assert_close(layer(X), y)


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: lora.Embedding(5, 4, r=2), torch.tensor([1, 3])),
        (lambda: lora.Conv2d(2, 4, 3, r=0), torch.randn(1, 2, 5, 5)),
        (lambda: lora.Conv2d(2, 4, 3, r=2, groups=2), torch.randn(1, 2, 5, 5)),
    ],
    ids=["embedding", "conv of r = 0", "grouped conv"],
)
def test_its_other_layers_evaluate(make, x):
    torch.manual_seed(0)
    layer = make()
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    want = layer(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), want)
    torch.testing.assert_close(layer.train()(x), want)


def test_a_layer_without_an_adapter_has_no_rank_to_set():
    layer = lora.Linear(2, 2)
    with pytest.raises(ValueError, match="rank: got 0"):
        layer.set_rank(0)
    assert layer.get_dimension() == 0
