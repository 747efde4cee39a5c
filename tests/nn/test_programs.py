"""A program written for loralib, run with either library: the same losses, files and predictions."""

import copy

import pytest
import torch
from torch import nn

import fastlora

loralib = pytest.importorskip("loralib")


class Net(nn.Module):
    """As loralib's GPT-2 example has its attention, with an embedding and a convolution around it."""

    def __init__(self, lora):
        super().__init__()
        self.wte = lora.Embedding(13, 8, r=2, lora_alpha=4)
        self.c_attn = lora.MergedLinear(8, 24, r=2, lora_alpha=4, enable_lora=[True, False, True],
                                        fan_in_fan_out=True, merge_weights=False)  # fmt: skip
        self.conv = lora.Conv2d(1, 3, 3, r=1, lora_alpha=2, padding=1)
        self.head = lora.Linear(24, 13, r=2)

    def forward(self, ids):
        q, k, v = self.c_attn(self.wte(ids)).chunk(3, -1)
        x = self.conv(((q @ k.mT).softmax(-1) @ v).unsqueeze(1))
        return self.head(x.transpose(1, 2).flatten(2))


def train(model, optimizer, ids):
    """The losses of a step, and of the merged model after it."""
    model.train()
    loss = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        return [loss.item(), model(ids).square().mean().item()]


def program(lora, ids, steps=8):
    torch.manual_seed(0)
    model = Net(lora)
    lora.mark_only_lora_as_trainable(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = [loss for _ in range(steps) for loss in train(model, optimizer, ids)]
    model.train()
    return model, optimizer, losses


@pytest.fixture
def ids():
    return torch.randint(0, 13, (4, 6), generator=torch.Generator().manual_seed(1))


def test_the_same_training_and_files_either_way(ids):
    theirs, their_optimizer, want = program(loralib, ids)
    ours, _, have = program(fastlora, ids)
    assert have == pytest.approx(want, rel=1e-3) and want[-2] < 0.9 * want[0]
    their_file, our_file = (lora.lora_state_dict(model) for lora, model in ((loralib, theirs), (fastlora, ours)))
    assert our_file.keys() == their_file.keys()
    for name, tensor in our_file.items():
        torch.testing.assert_close(tensor, their_file[name], rtol=1e-2, atol=1e-3)
    # an interrupted run of the one goes on with the other
    resumed, optimizer, _ = program(fastlora, ids, steps=0)
    resumed.load_state_dict(their_file, strict=False)
    optimizer.load_state_dict(copy.deepcopy(their_optimizer.state_dict()))
    for _ in range(2):
        assert train(resumed, optimizer, ids) == pytest.approx(train(theirs, their_optimizer, ids), rel=1e-3)


def test_whole_models_go_both_ways(ids):
    theirs, ours = program(loralib, ids)[0], program(fastlora, ids, steps=0)[0]
    assert not torch.allclose(ours(ids), theirs(ids), atol=1e-3)
    ours.load_state_dict(theirs.state_dict())
    back = program(loralib, ids, steps=0)[0]
    back.load_state_dict(theirs.state_dict() | {n: t for n, t in ours.state_dict().items() if n[:5] != "conv."})
    with torch.no_grad():
        for mode in (True, False):
            theirs.train(mode), back.train(mode)
            torch.testing.assert_close(ours.train(mode)(ids), theirs(ids), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(back(ids), theirs(ids))
