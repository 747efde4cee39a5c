"""Routed layers in a Hugging Face model: `generate(..., adapters=[...])`, and a context for a bare forward."""

import contextlib
import functools
import weakref

import torch

from fastlora.nn.bank import Chooser
from fastlora.nn.convert import change_class, check_convertible, dense_weight
from fastlora.nn.linear import lora_class
from fastlora.nn.switch import selection
from fastlora.ops import check
from fastlora.ops.routed import lora_routed_op
from fastlora.serve.batch import Batch
from fastlora.serve.pool import AdapterPool

# model -> (its pool, which refers to it, weakly; hooks)
_attached = weakref.WeakKeyDictionary()


class Routed(Chooser):
    """A linear layer whose tokens have adapters of their own, where this thread runs a batch; else its base."""

    def forward(self, x):
        batch = selection(self.owner)[0]
        if batch != () or self._chose is not None:
            self._note_run()
        if batch == () or batch.base_only:
            return super().forward(x)
        route, given = batch.for_layer(x), self.arena
        own = given.own_of(batch.pairs)
        return lora_routed_op(x, dense_weight(self), *own, self.bias, route.tensors, route.gates, (), (), given.tensors)


def attach(model, pool=None, **options):
    """Make a model's dense linear layers, in place, use a pool's adapters; by default AdapterPool(model, **options).

    `model.generate` then takes `adapters`, one spec for each prompt: None, a name, or {name: weight}; what the
    attention mask leaves out is the base's alone. Returns the pool. Raises ValueError for a model that has adapters of
    its own or is attached already, before anything changes. `detach(model)` undoes it.
    """
    check.value(model not in _attached, "model", "one that is attached already", "a plain one")
    modules = dict(model.named_modules())
    pool = AdapterPool(model, **options) if pool is None else pool
    check.value(pool.model is model, "pool", "another model's", "one made for this model")
    for name in pool.layers:
        check_convertible(name, modules, None)
    for name, layer in pool.layers.items():
        layer.owner, layer.arena = pool, pool.arenas[name]
        change_class(layer, lora_class(type(layer), Routed))
    hooks = [model.register_forward_pre_hook(functools.partial(_enter, pool), with_kwargs=True),
             model.register_forward_hook(functools.partial(_leave, pool), always_call=True)]  # fmt: skip
    if hasattr(model, "generate"):
        model.generate = functools.partial(_generate, weakref.ref(model), model.generate)
    _attached[model] = weakref.ref(pool), hooks
    return pool


def detach(model):
    """Make an attached model plain again; its pool keeps its adapters."""
    check.value(model in _attached, "model", f"a {type(model).__name__} that is not attached", "one after serve.attach")
    pool, hooks = _attached.pop(model)
    for hook in hooks:
        hook.remove()
    vars(model).pop("generate", None)
    for layer in pool().layers.values():
        for name in ("owner", "arena", "_chose", "_stack"):
            vars(layer).pop(name, None)
        change_class(layer, type(layer).lora_base)


@contextlib.contextmanager
def adapters(model, specs):
    """Context manager: in this thread, batch row i of an attached model's forwards uses specs[i], in training too.

    A spec is None, a name, or {name: weight}; of more rows, beams or copies of a prompt, each spec has as many. Under
    activation checkpointing pass `context_fn=fastlora.checkpoint_context`. Raises what `AdapterPool.acquire` does.
    """
    check.value(model in _attached, "model", f"a {type(model).__name__} that is not attached", "one after serve.attach")
    check.kind(not isinstance(specs, (str, dict)), "adapters", type(specs).__name__, "a spec for each batch row")
    pool = _attached[model][0]()
    with contextlib.ExitStack() as stack:
        lists = []
        for spec in specs:
            lease = pool.acquire(spec)
            stack.callback(lease.release)
            lists.append(lease.entries)
        stack.enter_context(pool.running(Batch(lists, pool.device)))
        yield


def _generate(model, generate, *args, **kwargs):
    specs = kwargs.pop("adapters", None)
    if specs is None:
        return generate(*args, **kwargs)
    prompts = next((t for t in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs")) if t is not None), None)
    whole = prompts is None or isinstance(specs, (str, dict)) or len(prompts) == len(specs)
    check.value(whole, "adapters", f"{len(specs)}", "one for each prompt")
    with adapters(model(), specs):
        return generate(*args, **kwargs)


def _enter(pool, model, args, kwargs):
    batch, mask, ids = selection(pool)[0], kwargs.get("attention_mask"), kwargs.get("input_ids")
    if isinstance(batch, Batch) and ids is not None:
        batch.shape = tuple(ids.shape)
    # a step of one token has no padding, and a look at the mask would make the host wait for the device
    wanted = isinstance(batch, Batch) and not batch.base_only and (ids is None or ids.shape[-1] > 1)
    if wanted and isinstance(mask, torch.Tensor) and mask.dim() == 2:
        batch.look_at(mask)


def _leave(pool, model, args, output):
    batch = selection(pool)[0]
    if isinstance(batch, Batch):
        batch.look_at(None)
