"""A transformer whose layers are gated: it runs once for the classifier, then with the gates."""

import inspect
import re
import threading

import torch

from fastlora.mixture.cache import find_cache, join_half, scaling_half
from fastlora.nn.switch import selected, switch
from fastlora.ops import check


class _Running(threading.local):
    def __init__(self):
        # (stack, the selection before, the scaling pass's cache) of the stacks whose forward this thread is in
        self.runs = ()


_running = _Running()


def stacks_of(model):
    """The transformers of a model whose output has a last hidden state: encoder and decoder, or the only one."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return [model.get_encoder(), model.get_decoder()]
    return [getattr(model, "base_model", model)]


def is_cross(name):
    """Whether a decoder's layer of this name reads the encoder's positions: the keys and values of cross-attention."""
    attention = re.search(r"encdecattention|encoder_?attn|cross_?att(n|ention)", name, re.IGNORECASE)
    return attention is not None and name.rpartition(".")[2] in ("k", "v", "k_proj", "v_proj", "key", "value", "c_attn")


class Stack:
    """Hooks around the forward of one of `stacks_of`: the first picks the gates for it, the second ends that.

    In between the layers that belong to `mixture.owner` find them in `switch`.
    """

    def __init__(self, mixture, module, cross, counts):
        # `cross`: the places of layers that read the encoder; `counts`: a forward of this stack is one of the model's
        self.mixture, self.counts = mixture, counts
        self.names = list(inspect.signature(module.forward).parameters)
        self.cross = cross if "encoder_hidden_states" in self.names and mixture.xlora_config.per_token else []
        before = module.register_forward_pre_hook(self.enter, with_kwargs=True)
        self.handles = before, module.register_forward_hook(self.leave, always_call=True)

    def unhook(self):
        """Take the hooks off again."""
        for handle in self.handles:
            handle.remove()

    # compiled as the root of a graph, a module would not see what its own hooks write to a threading.local
    @torch.compiler.disable(recursive=False)
    def enter(self, module, args, kwargs):
        before = switch.tasks
        _running.runs = (*_running.runs, (self, before, None))
        if self.mixture.is_disabled():
            return None
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        gates, half = self._gates(module, kwargs)
        _running.runs = (*_running.runs[:-1], (self, before, half))
        switch.tasks = ((self.mixture.owner, self.mixture.keys, gates), *before)
        return (), kwargs

    @torch.compiler.disable(recursive=False)
    def leave(self, module, args, output):
        # another hook may have raised before `enter`
        if not _running.runs or _running.runs[-1][0] is not self:
            return
        _, switch.tasks, half = _running.runs[-1]
        _running.runs = _running.runs[:-1]
        if half is not None and output is not None:
            cache = find_cache(output if isinstance(output, tuple) else output.values())
            if cache is not None:
                join_half(cache, half, self.mixture.scaling_mark())

    def _gates(self, module, kwargs):
        """(the gates of this forward, the cache of its scaling pass or None)"""
        mixture, cache = self.mixture, find_cache(kwargs.values())
        if not mixture.xlora_config.per_token and "use_cache" in self.names:
            check.value(cache is None, "past_key_values", "a cache", "none: gates of a whole sequence change with it")
            kwargs["use_cache"] = False
        fixed = mixture.next_fixed_gates(self.counts)
        if fixed is not None and cache is None and kwargs.get("use_cache") is False:
            return fixed, None
        own = {**kwargs, "return_dict": True, "output_hidden_states": False, "output_attentions": False}
        half = None
        if cache is not None:
            half = scaling_half(cache, mixture.scaling_mark())
            own.update({name: half for name, value in kwargs.items() if value is cache})
        with torch.no_grad(), selected(mixture.owner, *mixture.scaling_pass()):
            output = module.forward(**own)
        if fixed is None:
            mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
            fixed = self._with_cross(mixture.predict(output.last_hidden_state, mask, ids), kwargs)
        return fixed, find_cache(output.values()) if half is None else half

    def _with_cross(self, gates, kwargs):
        """`gates`, those of the layers that read the encoder's states being predicted from these."""
        states, cache = kwargs.get("encoder_hidden_states"), find_cache(kwargs.values())
        # once the cache holds their keys and values, these layers run no more
        if not self.cross or states is None or any(getattr(cache, "is_updated", {}).values()):
            return gates
        mixture = self.mixture
        theirs = mixture.gates_of(mixture.xlora_classifier(states))
        own, theirs = ([g] * len(mixture.experts) if isinstance(g, torch.Tensor) else list(g) for g in (gates, theirs))
        return tuple(theirs[i] if i in self.cross else g for i, g in enumerate(own))
