"""DDP and FSDP2 over gloo, two processes: the gradients of one process with the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fastlora.model import inject

WORLD = 2


def build():
    torch.manual_seed(0)
    model = inject(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), r=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model, torch.randn(WORLD * 3, 6)


def adapters(model):
    return {name.removeprefix("module."): p for name, p in model.named_parameters() if "lora_" in name}


def wrap(model, kind):
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def step(model, x):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    # a second forward sees the new adapters, not what was gathered before
    return model(x)


def worker(rank, kind, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        model, x = build()
        alone = copy.deepcopy(model)
        want = step(alone, x)
        mine = slice(rank * 3, rank * 3 + 3)
        torch.testing.assert_close(step(wrap(model, kind), x[mine]), want[mine])
        for name, parameter in adapters(model).items():
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            torch.testing.assert_close(whole, alone.get_parameter(name), msg=lambda text, name=name: f"{name}: {text}")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_gradients_over_two_processes(kind, tmp_path):
    mp.start_processes(worker, (kind, tmp_path / "store"), WORLD, start_method="fork")


def test_inject_after_sharding_is_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        from torch.distributed.fsdp import fully_shard

        model = nn.Sequential(nn.Linear(4, 4))
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="0: got a DTensor as weight"):
            inject(model, r=2)
    finally:
        dist.destroy_process_group()
