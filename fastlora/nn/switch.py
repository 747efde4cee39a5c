"""Which adapters run, per thread: layers that are off, the tasks in force, ranks for each batch row; gates of rows.

`threading.local`, because Dynamo traces and guards it, which it does not do for a ContextVar. A recompute of activation
checkpointing may run after the block that set the state, or in autograd's own thread: `checkpoint_context` carries the
state there, and a recompute without it that could differ from the first forward raises.
"""

import contextlib
import threading

import torch
from torch.utils._python_dispatch import BaseTorchDispatchMode

from fastlora.ops import check


class _Switch(threading.local):
    def __init__(self):
        # in the instance from the start: Dynamo's guard on an attribute of the class would miss the first block.
        # `off` holds the layers' ids, as of a set of modules Dynamo guards the length alone.
        # `tasks` holds (owner, keys, gates), the innermost block's first; `row_ranks` the ranks by a layer's id.
        # `apart` says that some layers are off or ranked by row, so that others ask no further
        self.off, self.tasks, self.row_ranks, self.restored, self.apart = frozenset(), (), {}, False, False


switch = _Switch()


@contextlib.contextmanager
def _set(off, tasks, row_ranks, restored):
    before = switch.off, switch.tasks, switch.row_ranks, switch.restored, switch.apart
    apart = bool(off or row_ranks)
    switch.off, switch.tasks, switch.row_ranks, switch.restored, switch.apart = off, tasks, row_ranks, restored, apart
    try:
        yield
    finally:
        switch.off, switch.tasks, switch.row_ranks, switch.restored, switch.apart = before


def turned_off(layers):
    """Context manager: in this thread, these layers too run without their adapters."""
    return _set(switch.off | frozenset(map(id, layers)), switch.tasks, switch.row_ranks, switch.restored)


def selected(owner, keys, gates=None):
    """Context manager: in this thread, `owner`'s layers run these tasks, with gates (E,), (batch, E) or None."""
    return _set(switch.off, ((owner, keys, gates), *switch.tasks), switch.row_ranks, switch.restored)


def selection(owner):
    """(keys, gates) of the tasks that this thread runs in `owner`'s layers; ((), None) for none."""
    for its, keys, gates in switch.tasks:
        if its is owner:
            return keys, gates
    return (), None


def rows_ranked(layers, ranks):
    """Context manager: in this thread, batch row i uses the first ranks[i] components of these layers' adapters."""
    return _set(switch.off, switch.tasks, switch.row_ranks | dict.fromkeys(map(id, layers), ranks), switch.restored)


def checkpoint_context():
    """The `context_fn` for `torch.utils.checkpoint` (use_reentrant=False): a recompute sees what the forward saw."""
    if torch.compiler.is_compiling():
        # the trace already holds the state; torch demands dispatch modes here
        return BaseTorchDispatchMode(), BaseTorchDispatchMode()
    return contextlib.nullcontext(), _set(switch.off, switch.tasks, switch.row_ranks, True)


def is_recompute():
    """Whether this forward is a checkpoint's recompute, inside a backward pass, to which no state was carried."""
    if torch.compiler.is_compiling() or switch.restored or not torch.is_grad_enabled():
        return False
    return torch._C._current_graph_task_id() != -1


def cannot_know(what):
    got = f"{what} around a checkpointed forward, and its recompute cannot know"
    expected = "context_fn=fastlora.checkpoint_context (use_reentrant=False) in torch.utils.checkpoint"
    raise RuntimeError(f"fastlora: {got}: expected {expected}")


def is_off(layer):
    """Whether this thread runs `layer` without its adapter. Raises RuntimeError in a recompute that cannot know."""
    if not (switch.apart or layer._ran or layer.rank):
        return False
    off = id(layer) in switch.off
    mode = "off" if off else "by row" if id(layer) in switch.row_ranks else layer.rank
    if is_recompute():
        if mode in ("off", "by row") or layer._ran - {mode}:
            cannot_know("disable_adapter, model_rank or row_ranks was used")
    elif (mode or layer._ran) and not (switch.restored or torch.compiler.is_compiling()):
        # reentrant checkpointing runs its first forward without gradients; a reference pass, off, does so too
        layer._ran |= {mode} if torch.is_grad_enabled() or layer.training and not off else set()
    return off


def match_rows(x, leading, gates):
    """x and its gates, in a shape that broadcasts over (*leading, E).

    `leading` are x's dimensions of positions, the batch first. Gates are (E,), for all; (batch, E), a row's; or (batch,
    tokens, E), for positions that a layer may get flattened. A single row of x is repeated for the gates of several.
    """
    if gates is None or gates.dim() < 2 or gates.shape[:-1] == leading:
        return x, gates
    *given, E = gates.shape
    if len(given) == 2 and len(leading) == 1 and leading[0] == given[0] * given[1]:
        return x, gates.flatten(0, 1)
    # sizes are compared one by one: Dynamo's symbolic ones are equal to nothing inside a list
    fits = len(leading) >= len(given) and (leading[0] == given[0] or leading[0] == 1)
    fits = fits and all(a == b for a, b in zip(leading[1:], given[1:], strict=False))
    what = f"{given[0]} batch rows" if len(given) == 1 else f"{given[0]} batch rows of {given[1]} tokens"
    check.value(fits, "x", f"shape {tuple(x.shape)}", f"{what}: each has adapters of its own")
    if leading[0] != given[0]:
        x = x.expand(given[0], *x.shape[1:])
    return x, gates.view(*given, *(1,) * (len(leading) - len(given)), E)


class Stacked(tuple):
    """One tensor that holds the rank rows of several adapters, of `ranks`."""


def rank_list(A, gates):
    """The op's `ranks`: () for a single adapter that has a gate for each rank row, or none at all."""
    if isinstance(A, Stacked):
        return A.ranks
    ranks = [a.shape[0] for a in A]
    lone = len(ranks) == 1 and (gates is None or gates.shape[-1] == ranks[0])
    return () if lone else ranks
