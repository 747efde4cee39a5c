"""disable_adapter: per thread, seen by compiled code, and never wrong in a checkpointed recompute."""

import functools
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastlora.model import disable_adapter, inject
from fastlora.nn import checkpoint_context


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    base.load_state_dict(model.state_dict())
    inject(model, r=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model, base, torch.randn(3, 6, requires_grad=True)


def test_off_inside_the_block_only():
    model, base, x = build()
    on = model(x)
    with disable_adapter(model):
        assert torch.equal(model(x), base(x))
        with disable_adapter(model[0]):
            assert torch.equal(model(x), base(x))
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), on) and not torch.equal(on, base(x))
    with pytest.raises(KeyError), disable_adapter(model):
        raise KeyError
    assert torch.equal(model(x), on)


def test_other_models_and_other_threads_keep_their_adapters():
    model, base, x = build()
    other, _, _ = build()
    on, seen = model(x), []
    with disable_adapter(model):
        assert torch.equal(other(x), on)
        thread = threading.Thread(target=lambda: seen.append(model(x)))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], on)


def test_opaque_and_merged_layers_are_off_too():
    from fastlora.model import merge

    class Own(nn.Linear):
        pass

    x = torch.randn(2, 4)
    for make in (lambda: inject(Own(4, 4), r=2), lambda: merge(inject(nn.Linear(4, 4), r=2).eval())):
        layer = make()
        nn.init.normal_(layer.lora_B)
        with torch.no_grad(), disable_adapter(layer):
            assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_compiled_code_sees_the_switch():
    model, base, x = build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model(x))
        with disable_adapter(model):
            torch.testing.assert_close(compiled(x), base(x))


def test_compiled_code_sees_the_first_switch_of_a_thread():
    torch._dynamo.reset()
    model, base, x = build()
    compiled, seen = torch.compile(model, fullgraph=True, backend="aot_eager"), []

    def run():
        seen.append(compiled(x))
        with disable_adapter(model):
            seen.append(compiled(x))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    torch.testing.assert_close(seen, [model(x), base(x)])


def test_compiled_code_knows_whose_adapters_are_off():
    (model, base, x), (other, _, _) = build(), build()
    compiled, others = (torch.compile(m, fullgraph=True, backend="aot_eager") for m in (model, other))
    with disable_adapter(model):
        torch.testing.assert_close(compiled(x), base(x))
        torch.testing.assert_close(others(x), other(x))
    with disable_adapter(other):
        torch.testing.assert_close(others(x), base(x))
        torch.testing.assert_close(compiled(x), model(x))


def gradient(model, x, run, off_in_forward, off_in_backward):
    model.train()
    x = x.detach().requires_grad_()
    if off_in_forward:
        with disable_adapter(model):
            loss = run(model, x).square().sum()
    else:
        loss = run(model, x).square().sum()
    if off_in_backward:
        with disable_adapter(model):
            loss.backward()
    else:
        loss.backward()
    return x.grad


def plain(model, x):
    return model(x)


def recompute(model, x, **options):
    return checkpoint(model, x, use_reentrant=False, **options)


@pytest.mark.parametrize("off_in_forward", [True, False])
@pytest.mark.parametrize("off_in_backward", [True, False])
def test_a_recompute_is_restored_by_context_fn(off_in_forward, off_in_backward):
    model, _, x = build()
    restored = functools.partial(recompute, context_fn=checkpoint_context)
    want = gradient(model, x, plain, off_in_forward, off_in_forward)
    torch.testing.assert_close(gradient(model, x, restored, off_in_forward, off_in_backward), want)


@pytest.mark.parametrize("off_in_forward, off_in_backward", [(True, False), (False, True)])
def test_a_recompute_that_cannot_know_raises(off_in_forward, off_in_backward):
    model, _, x = build()
    with pytest.raises(RuntimeError, match="context_fn=fastlora.checkpoint_context"):
        gradient(model, x, recompute, off_in_forward, off_in_backward)
    # the next training step starts afresh
    torch.testing.assert_close(gradient(model, x, recompute, False, False), gradient(model, x, plain, False, False))


def test_a_reference_pass_without_gradients_does_not_disturb_checkpointing():
    model, _, x = build()
    for reentrant in (False, True):
        with torch.no_grad(), disable_adapter(model):
            model(x)
        out = checkpoint(model, x, use_reentrant=reentrant)
        (have,) = torch.autograd.grad(out.sum(), x) if not reentrant else (None,)
        if reentrant:
            x.grad = None
            out.sum().backward()
            have = x.grad
        torch.testing.assert_close(have, torch.autograd.grad(model(x).sum(), x)[0])
