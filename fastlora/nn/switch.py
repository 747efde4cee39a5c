"""Which layers run without their adapters, per thread.

`threading.local`, because Dynamo traces and guards it, which it does not do for a ContextVar. A recompute of activation
checkpointing may run after the block that turned adapters off, or in autograd's own thread: `checkpoint_context`
carries the state there, and a recompute without it that could differ from the first forward raises.
"""

import contextlib
import threading

import torch


class _Switch(threading.local):
    def __init__(self):
        # in the instance from the start: Dynamo's guard on an attribute of the class would miss the first block.
        # `off` holds the layers' ids, as of a set of modules Dynamo guards the length alone
        self.off, self.restored = frozenset(), False


switch = _Switch()


@contextlib.contextmanager
def _set(off, restored):
    before = switch.off, switch.restored
    switch.off, switch.restored = off, restored
    try:
        yield
    finally:
        switch.off, switch.restored = before


def turned_off(layers):
    """Context manager: in this thread, these layers too run without their adapters."""
    return _set(switch.off | frozenset(map(id, layers)), switch.restored)


def checkpoint_context():
    """The `context_fn` for `torch.utils.checkpoint` (use_reentrant=False): a recompute sees what the forward saw."""
    return contextlib.nullcontext(), _set(switch.off, True)


def is_off(layer):
    """Whether this thread runs `layer` without its adapter. Raises RuntimeError in a recompute that cannot know."""
    off = id(layer) in switch.off
    if torch.compiler.is_compiling() or switch.restored or not torch.is_grad_enabled():
        return off
    # inside a backward pass a forward is a recompute
    if torch._C._current_graph_task_id() != -1:
        if off or layer._ran_off:
            raise RuntimeError(
                "fastlora: disable_adapter was used around a checkpointed forward, and its recompute cannot know: "
                "expected context_fn=fastlora.checkpoint_context in torch.utils.checkpoint"
            )
    elif off:
        layer._ran_off = True
    return off
