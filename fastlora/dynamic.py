"""DyLoRA: one training run, after which every rank from 1 to r is usable.

A layer at rank k runs slices of its factors, views, so that the cost falls with k. Training draws a rank for each
optimizer step. A program for DyLoRA's fork of loralib runs with `import fastlora.dynamic as lora`.
"""

import collections
import copy
import functools
import math
import random
import warnings
import weakref

import torch
from torch import nn

from fastlora.checkpoint import lora_state_dict
from fastlora.model import lora_layers, mark_only_lora_as_trainable
from fastlora.nn import Conv2d, Embedding, LoRALayer, MergedLinear
from fastlora.nn import linear as static
from fastlora.nn.layer import ranked_layers, whole
from fastlora.nn.switch import rows_ranked
from fastlora.ops import check

__all__ = [
    "Conv2d", "DyLinear", "Embedding", "LoRALayer", "Linear", "MergedLinear", "evaluate_ranks", "hold_frozen_rows",
    "lora_state_dict", "mark_only_lora_as_trainable", "model_rank", "row_ranks", "sample", "truncate",
]  # fmt: skip

# what hold_frozen_rows returned; layers whose backward looks for it
_holds, _watched = weakref.WeakSet(), weakref.WeakSet()
_warned = False


class DyLinear(static.Linear):
    """DyLoRA's Linear: loralib's arguments and state-dict keys, at rank 1 to begin with.

    y = x Wᵀ + bias + lora_alpha / k (D(x) lora_A[:k]ᵀ) lora_B[:, :k]ᵀ. `set_rank(index)` is 0-based: k is index + 1;
    `frozen` trains component k alone. ValueError names the argument. Source: Valipour et al. 2022, arXiv 2210.07558.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.r:
            self.use_rank(1)

    def get_dimension(self):
        """r, the number of ranks."""
        return self.r

    def get_rank(self):
        """The 0-based rank index: the layer uses one component more."""
        return (self.rank or self.r) - 1

    def set_rank(self, rank, frozen=False):
        """Use `rank` + 1 components from now on, 0 <= rank < r; with `frozen` only the last of them trains."""
        check.value(self.r, "rank", f"{rank!r} on a layer without an adapter", "a layer of r >= 1")
        check.value(whole(rank) and 0 <= rank < self.r, "rank", repr(rank), f"an index from 0 to {self.r - 1}")
        _set([self], rank + 1, frozen, new_step=True)


Linear = DyLinear


def _layers(model):
    """(the layers with a rank, the largest r of them)"""
    layers = list(lora_layers(model).values())
    check.value(layers, "model", "no layer of rank 1 or more", "layers with an adapter of their own")
    for layer in layers:
        # raises where a part of r means nothing
        layer.narrow(layer.lora_A, layer.lora_B, 0, 1)
    return layers, max(layer.r for layer in layers)


def _set(layers, rank, frozen=False, new_step=False):
    most = max(layer.r for layer in layers)
    check.value(rank is None or whole(rank) and 1 <= rank <= most, "rank", repr(rank), f"an integer from 1 to {most}")
    check.value(rank or not frozen, "frozen", frozen, "False where the rank is None")
    for layer in layers:
        layer.use_rank(rank and min(rank, layer.r), frozen)
        if new_step:
            # no backward of earlier forwards will follow, whose recompute might be at another rank
            layer._ran = frozenset()
        if frozen and layer not in _watched:
            _watched.add(layer)
            for parameter in filter(lambda p: p.requires_grad, (layer.lora_A, layer.lora_B)):
                parameter.register_post_accumulate_grad_hook(functools.partial(_check_held, weakref.ref(layer)))


def _check_held(layer, parameter):
    """In a backward: warn once of a frozen step that no optimizer holds."""
    global _warned
    if _warned or layer() is None or not layer().frozen or any(hold.has(parameter) for hold in _holds):
        return
    _warned = True
    warnings.warn("fastlora: frozen rows have a zero gradient, but weight decay and momentum still move them: "
                  "call dynamic.hold_frozen_rows(optimizer)", stacklevel=2)  # fmt: skip


class model_rank:
    """Run a model or a layer at rank k from now on, or in a `with` block: `with model_rank(model, 4): model(x)`.

    k counts from 1; a layer whose r is lower uses all it has; None is every layer's r; all threads see it. With
    `frozen` component k alone trains: `optimizer.step()` belongs into the block, so does backward if checkpointed, or a
    recompute at another rank raises. Its end puts the layers' ranks back. Raises ValueError for k outside 1 to r.
    """

    def __init__(self, model, k, frozen=False):
        (self.layers, self.most), self.given = _layers(model), (k, frozen)
        self.before = [(layer.rank, layer.frozen) for layer in self.layers]
        for layer in self.layers:
            # its backward is over; one of a block that has ended may still come, and must not find another rank
            layer._ran -= {layer.rank}
        _set(self.layers, *self.given)

    def __enter__(self):
        # again, in case another rank was set since, or an earlier block of this object has ended
        _set(self.layers, *self.given)
        return self

    def __exit__(self, *_):
        for layer, (rank, frozen) in zip(self.layers, self.before, strict=True):
            layer.use_rank(rank, frozen)


def sample(model, step, seed=0, frozen=False, distribution="uniform"):
    """Draw the rank of an optimizer step, from 1 to r, set it in all layers, and return it.

    It depends on (seed, step) alone, on every process and after a restart. `distribution`: "uniform", the paper's, or r
    weights. The paper's recipe is `frozen`: component k alone trains, in train mode; see `hold_frozen_rows`. Raises
    ValueError for another distribution, TypeError for a step that is no integer.
    """
    layers, most = _layers(model)
    weights = [1] * most if isinstance(distribution, str) and distribution == "uniform" else distribution
    listed = isinstance(weights, (list, tuple)) and len(weights) == most
    fits = listed and all(isinstance(w, (int, float)) and 0 <= w < math.inf for w in weights) and sum(weights) > 0
    check.value(fits, "distribution", repr(distribution), f"'uniform' or {most} weights, none negative")
    check.kind(isinstance(step, int) and isinstance(seed, int), "step", f"{step!r} with seed {seed!r}", "integers")
    rank = random.Random(f"{seed} {step}").choices(range(1, most + 1), weights)[0]
    _set(layers, rank, frozen, new_step=True)
    return rank


def row_ranks(model, ranks):
    """Context manager: in this thread batch row i runs the model at rank ranks[i], as a 0/1 gate on each component.

    Layers see one batch row for each rank, or one for all; a layer whose r is lower uses all it has. Nothing is frozen
    in it. Raises ValueError for a rank outside 1 to r.
    """
    layers, most = _layers(model)
    given = getattr(ranks, "tolist", lambda: ranks)()
    valid = isinstance(given, (list, tuple)) and given and all(whole(k) and 1 <= k <= most for k in given)
    check.value(valid, "ranks", repr(given), f"a list of integers from 1 to {most}")
    return rows_ranked(layers, torch.tensor(given, dtype=torch.float32))


def truncate(model, k):
    """A copy of a model or layer with plain LoRA of rank k: its first k components, with the output it has at rank k.

    A layer whose r is lower stays as it is. Raises ValueError for k outside 1 to r.
    """
    check.value(k is not None, "rank", k, "an integer")
    model = copy.deepcopy(model)
    layers, _ = _layers(model)
    _set(layers, k, new_step=True)
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

    The ranks are put back; the training mode is fn's affair. NaN is never the best: all NaN, or tolerance < 0, raise.
    """
    check.value(tolerance >= 0, "tolerance", tolerance, "a number of at least 0")
    values = {}
    with model_rank(model, None) as own:
        for k in range(1, own.most + 1):
            _set(own.layers, k)
            values[k] = fn(model)
    signed = {k: value if higher_is_better else -value for k, value in values.items() if not math.isnan(value)}
    check.value(signed, "fn", "NaN at every rank", "a number")
    best = max(signed.values())
    return RankReport(values, next(k for k, value in signed.items() if value >= best - tolerance))


class hold_frozen_rows:
    """Make frozen mode exact: after each `optimizer.step()`, all but the live component are as they were before it.

    AdamW's decay and momentum move rows of zero gradient; this puts them back, those above k too, and their state, from
    a copy it keeps during a step. The live component is that of the rank at the end of `step()`. Returns a handle whose
    `remove()` ends it. Raises TypeError for optimizers whose state has no entry for each entry of a parameter.
    """

    def __init__(self, optimizer):
        # accelerate's is a wrapper
        optimizer = getattr(optimizer, "optimizer", optimizer)
        refused = {cls.__name__ for cls in type(optimizer).__mro__} & {"Adafactor", "LBFGS", "Muon", "SparseAdam"}
        fits = isinstance(optimizer, torch.optim.Optimizer) and not refused
        expected = "one whose state has each parameter's shape, such as torch.optim.AdamW"
        check.kind(fits, "optimizer", type(optimizer).__name__, expected)
        self.optimizer, self.before, self.ids = optimizer, {}, frozenset()
        self.hooks = optimizer.register_step_pre_hook(self._copy), optimizer.register_step_post_hook(self._put_back)
        _holds.add(self)

    def remove(self):
        for hook in self.hooks:
            hook.remove()
        _holds.discard(self)

    def has(self, parameter):
        if id(parameter) not in self.ids:
            # a group may have been added since
            self.ids = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return id(parameter) in self.ids

    def _copy(self, optimizer, args, kwargs):
        # a closure may set the rank
        may_change = len(args) > 1 or bool(kwargs)
        # a layer that `remove` made plain again has no rank
        ranked = [m for m in ranked_layers if isinstance(m, LoRALayer) and (m.frozen or may_change)]
        held = [(p, m) for m in ranked for p in (m.lora_A, m.lora_B) if self.has(p)]
        self.before = {p: (m, {key: t.clone() for key, t in _rowed(optimizer, p)}) for p, m in held}

    @torch.no_grad()
    def _put_back(self, optimizer, *_):
        before, self.before = self.before, {}
        for parameter, (layer, saved) in before.items():
            if not layer.frozen:
                continue
            places = [torch.arange(p.numel(), device=p.device).view(p.shape) for p in (layer.lora_A, layer.lora_B)]
            live = layer.narrow(*places, layer.rank - 1, layer.rank)[parameter is layer.lora_B].flatten()
            for key, tensor in _rowed(optimizer, parameter):
                old = saved.get(key)
                if old is None:
                    # made in this step, from zeros; Rprop's step sizes begin at the learning rate, for all rows
                    old = tensor.clone() if key == "step_size" else torch.zeros_like(tensor)
                tensor.copy_(old.view(-1).index_copy(0, live, tensor.reshape(-1)[live]).view(tensor.shape))


def _rowed(optimizer, parameter):
    """The parameter and the tensors of its shape in the optimizer's state, each with a key."""
    yield None, parameter.detach()
    for key, tensor in optimizer.state.get(parameter, {}).items():
        if isinstance(tensor, torch.Tensor) and tensor.dim():
            check.value(tensor.shape == parameter.shape, "optimizer", f"a state {key!r} of shape {tuple(tensor.shape)}",
                        f"{tuple(parameter.shape)}, its parameter's")  # fmt: skip
            yield key, tensor
