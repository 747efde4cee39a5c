"""DyLoRA: one training run, after which every rank from 1 to r is usable.

A layer at rank k computes y = base(x) + lora_alpha / k (D(x) lora_A[:k]ᵀ) lora_B[:, :k]ᵀ: slices of its factors, views,
so that the cost falls with k. Training draws one rank for each optimizer step. A program written for DyLoRA's fork of
loralib runs with `import fastlora.dynamic as lora`. Source: Valipour et al. 2022, arXiv 2210.07558.
"""

import collections
import copy
import random
import warnings
import weakref

import torch
from torch import nn

from fastlora.checkpoint import lora_state_dict
from fastlora.model import lora_layers, mark_only_lora_as_trainable
from fastlora.nn import Conv2d, Embedding, LoRALayer, MergedLinear
from fastlora.nn import linear as static
from fastlora.nn.switch import rows_ranked
from fastlora.ops import check

__all__ = [
    "Conv2d",
    "DyLinear",
    "Embedding",
    "LoRALayer",
    "Linear",
    "MergedLinear",
    "evaluate_ranks",
    "hold_frozen_rows",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "model_rank",
    "row_ranks",
    "sample",
    "truncate",
]

# id of a parameter -> its layer, of those whose rank was set here; -> the optimizer that holds its frozen rows
_owners, _holders = weakref.WeakValueDictionary(), weakref.WeakValueDictionary()
# optimizers whose state has no entry for each entry of a parameter
_REFUSED = ("Adafactor", "LBFGS", "Muon", "SparseAdam")
_warned = False


class DyLinear(static.Linear):
    """DyLoRA's Linear: loralib's arguments and state-dict keys, at rank 1 to begin with.

    y = x Wᵀ + bias + lora_alpha / k (D(x) lora_A[:k]ᵀ) lora_B[:, :k]ᵀ. `set_rank(index)` is the original's, 0-based: k
    is index + 1; `frozen` trains component k alone. Raises ValueError naming the argument. Source: arXiv 2210.07558.
    """

    lora_base = nn.Linear

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.r:
            self.use_rank(1)

    def get_dimension(self):
        """r, the number of ranks."""
        return self.r

    def get_rank(self):
        """The 0-based rank index: the layer uses one component more."""
        return self.rank - 1

    def set_rank(self, rank, frozen=False):
        """Use `rank` + 1 components from now on, 0 <= rank < r; with `frozen` only the last of them trains."""
        valid = isinstance(rank, int) and not isinstance(rank, bool) and 0 <= rank < self.r
        check.value(valid, "rank", repr(rank), f"an index from 0 to {self.r - 1}")
        _begin_step([self], rank + 1, frozen)


Linear = DyLinear


def _layers(model):
    layers = [model] if isinstance(model, LoRALayer) else list(lora_layers(model).values())
    check.value(layers and all(m.r for m in layers), "model", "no layer of rank 1 or more", "layers with an adapter")
    return layers


def _set(layers, rank, frozen):
    most = max(layer.r for layer in layers)
    valid = rank is None or isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= most
    check.value(valid, "rank", repr(rank), f"an integer from 1 to {most}")
    for layer in layers:
        layer.use_rank(rank and min(rank, layer.r), frozen)
        _owners[id(layer.lora_A)] = _owners[id(layer.lora_B)] = layer


def _begin_step(layers, rank, frozen):
    """Set the rank of a training step, before which no backward is pending; warn of a frozen step that was not held."""
    global _warned
    loose = any(m.frozen and m.training and m._ran and id(m.lora_A) not in _holders for m in layers)
    if loose and frozen and not _warned:
        _warned = True
        warnings.warn(
            "fastlora: frozen rows have a zero gradient, but weight decay and momentum still move them: "
            "call dynamic.hold_frozen_rows(optimizer)",
            stacklevel=3,
        )
    _set(layers, rank, frozen)
    for layer in layers:
        layer.forget_runs()


class model_rank:
    """Run a model or a layer at rank k from now on, or in a `with` block: `with model_rank(model, 4): model(x)`.

    k counts from 1; a layer whose r is lower uses all it has; None uses every layer's r. With `frozen`, training
    changes component k alone. The end of a block puts each layer's own rank back. The rank is the model's, for all
    threads. Raises ValueError for k outside 1 to r.
    """

    def __init__(self, model, k, frozen=False):
        self.layers = _layers(model)
        self.before = [(layer.rank, layer.frozen) for layer in self.layers]
        _set(self.layers, k, frozen)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for layer, (rank, frozen) in zip(self.layers, self.before, strict=True):
            layer.use_rank(rank, frozen)


def sample(model, step, seed=0, frozen=False, distribution="uniform"):
    """Draw the rank of an optimizer step, from 1 to r, set it in all layers, and return it.

    It depends on (seed, step) alone: every process, and a run that goes on from a checkpoint, draws the same.
    `distribution` is "uniform", the paper's, or r weights. The paper's recipe is `frozen`: component k alone trains;
    see `hold_frozen_rows`. Raises ValueError for another distribution, TypeError for a step that is no integer.
    """
    layers = _layers(model)
    most = max(layer.r for layer in layers)
    weights = [1] * most if isinstance(distribution, str) and distribution == "uniform" else distribution
    listed = isinstance(weights, (list, tuple)) and len(weights) == most
    fits = listed and all(w >= 0 for w in weights) and sum(weights) > 0
    check.value(fits, "distribution", repr(distribution), f"'uniform' or {most} weights, none negative")
    check.kind(isinstance(step, int) and isinstance(seed, int), "step", f"{step!r} with seed {seed!r}", "integers")
    rank = random.Random(f"{seed} {step}").choices(range(1, most + 1), weights)[0]
    _begin_step(layers, rank, frozen)
    return rank


def row_ranks(model, ranks):
    """Context manager: in this thread batch row i runs at rank ranks[i], as a 0/1 gate on each component.

    Layers see one batch row for each rank, or one for all. Raises ValueError for a rank outside 1 to r.
    """
    least = min(layer.r for layer in _layers(model))
    given = [int(k) if int(k) == k else 0 for k in ranks]
    check.value(given and min(given) >= 1 and max(given) <= least, "ranks", ranks, f"integers from 1 to {least}")
    return rows_ranked(torch.tensor(given, dtype=torch.float32))


def truncate(model, k):
    """A copy of a model or layer with plain LoRA of rank k: its first k components, with the output it has at rank k.

    A layer whose r is lower stays as it is. Raises ValueError for k outside 1 to r.
    """
    model = copy.deepcopy(model)
    layers = _layers(model)
    _set(layers, k, False)
    for layer in layers:
        pair = layer.narrow(layer.lora_A.detach(), layer.lora_B.detach(), 0, layer.rank)
        for name, old, new in zip(("lora_A", "lora_B"), (layer.lora_A, layer.lora_B), pair, strict=True):
            setattr(layer, name, nn.Parameter(new.clone(), requires_grad=old.requires_grad))
        layer.r, layer.rank = layer.rank, None
        if type(layer) is DyLinear:
            layer.__class__ = static.Linear
    return model


RankReport = collections.namedtuple("RankReport", ["values", "rank"])


def evaluate_ranks(model, fn, tolerance=0.0, higher_is_better=True):
    """({rank: fn(model)} for every rank, the smallest rank whose value is within `tolerance` of the best).

    The model's ranks are put back afterwards; its training mode is fn's affair.
    """
    values = {}
    with model_rank(model, None):
        layers = _layers(model)
        for k in range(1, max(layer.r for layer in layers) + 1):
            _set(layers, k, False)
            values[k] = fn(model)
    sign = 1 if higher_is_better else -1
    best = max(sign * value for value in values.values())
    return RankReport(values, next(k for k, value in values.items() if sign * value >= best - tolerance))


def hold_frozen_rows(optimizer):
    """Make frozen mode exact: after each `optimizer.step()`, all but the live component are as they were before it.

    A zero gradient still decays a row under AdamW and carries its momentum; this puts the rows back, those above k too,
    and their optimizer state. It needs a copy of the adapters and of their state during a step. Returns a handle whose
    `remove()` ends it. Raises TypeError for optimizers whose state has no entry for each entry of a parameter.
    """
    name = type(optimizer).__name__
    check.kind(name not in _REFUSED, "optimizer", name, "one whose state has each parameter's shape, such as AdamW")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            _holders[id(parameter)] = optimizer
    before = {}
    hooks = (
        optimizer.register_step_pre_hook(lambda *_: before.update(_frozen_tensors(optimizer))),
        optimizer.register_step_post_hook(lambda *_: _put_back(optimizer, before)),
    )
    return _Handle(optimizer, hooks)


class _Handle:
    def __init__(self, optimizer, hooks):
        self.optimizer, self.hooks = weakref.ref(optimizer), hooks

    def remove(self):
        for hook in self.hooks:
            hook.remove()
        for key in [key for key, holder in _holders.items() if holder is self.optimizer()]:
            del _holders[key]


def _frozen_tensors(optimizer):
    """{parameter: (indices of its live entries, copies of it and of its state)} of what a frozen step may move."""
    found = {}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        layer = _owners.get(id(parameter))
        if layer is None or not layer.frozen or not any(parameter is p for p in (layer.lora_A, layer.lora_B)):
            continue
        places = [torch.arange(p.numel(), device=p.device).view(p.shape) for p in (layer.lora_A, layer.lora_B)]
        live = layer.narrow(*places, layer.rank - 1, layer.rank)[parameter is layer.lora_B].flatten()
        found[parameter] = live, {key: tensor.clone() for key, tensor in _rowed(optimizer, parameter)}
    return found


def _rowed(optimizer, parameter):
    """The parameter and the tensors of its shape in the optimizer's state, each with a key."""
    yield None, parameter.detach()
    for key, tensor in optimizer.state.get(parameter, {}).items():
        if isinstance(tensor, torch.Tensor) and tensor.dim():
            check.value(tensor.shape == parameter.shape, "optimizer", f"a state {key!r} of shape {tuple(tensor.shape)}",
                        f"{tuple(parameter.shape)}, its parameter's")  # fmt: skip
            yield key, tensor


@torch.no_grad()
def _put_back(optimizer, before):
    for parameter, (live, saved) in before.items():
        for key, tensor in _rowed(optimizer, parameter):
            old = saved.get(key)
            if old is None:
                # made in this step, from nothing but zeros; Rprop's step sizes begin at the learning rate, for all rows
                old = tensor.clone() if key == "step_size" else torch.zeros_like(tensor)
            now = tensor.reshape(-1)[live]
            tensor.copy_(old.view(-1).index_copy(0, live, now).view(tensor.shape))
    before.clear()
