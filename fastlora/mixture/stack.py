"""A transformer whose layers are gated: it runs once for the classifier, then with the gates.

The scaling pass's keys and values stand behind the model's own in the one list of layers of its cache, so what is done
to the cache is done to both: from `scaling_start` on; `scaling_mark` says whose they are.
"""

import copy
import inspect
import re
import threading

import torch

from fastlora.nn.switch import selected, switch
from fastlora.ops import check

# `runs`: (stack, the selection before, the scaling pass's cache) of the stacks whose forward this thread is in
_running = threading.local()


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

    In between the layers that belong to `mixture.owner` find them in `switch`. `cross`: the places of layers that read
    the encoder; `counts`: a forward of this stack is one of the model's.
    """

    def __init__(self, mixture, module, cross, counts):
        self.mixture, self.counts = mixture, counts
        self.names = list(inspect.signature(module.forward).parameters)
        self.cross = cross if "encoder_hidden_states" in self.names and mixture.xlora_config.per_token else []
        before = module.register_forward_pre_hook(self.enter, with_kwargs=True)
        self.handles = before, module.register_forward_hook(self.leave, always_call=True)

    # compiled as the root of a graph, a module would not see what its own hooks write to a threading.local
    @torch.compiler.disable(recursive=False)
    def enter(self, module, args, kwargs):
        before, half = switch.tasks, None
        # in `disable_adapter` this thread runs the model alone
        if not switch.off or any(id(layer) not in switch.off for layer in self.mixture.experts):
            args, kwargs = (), {**dict(zip(self.names, args, strict=False)), **kwargs}
            gates, half = self._gates(module, kwargs)
            switch.tasks = ((self.mixture.owner, self.mixture.keys, gates), *before)
        _running.runs = (*getattr(_running, "runs", ()), (self, before, half))
        return args, kwargs

    @torch.compiler.disable(recursive=False)
    def leave(self, module, args, output):
        runs = getattr(_running, "runs", ())
        # `enter` or another hook may have raised before
        if not runs or runs[-1][0] is not self:
            return
        _running.runs, (_, switch.tasks, half) = runs[:-1], runs[-1]
        if half is None or output is None:
            return
        cache = find_cache(output if isinstance(output, tuple) else output.values())
        if cache is None:
            return
        # what the scaling pass has made goes behind what the model has made
        for part, own in zip(_parts(cache), _parts(half), strict=True):
            if not hasattr(part, "scaling_start"):
                part.scaling_start = len(part.layers)
                part.layers.extend(own.layers)
            part.scaling_mark = self.mixture.scaling_mark()

    def _gates(self, module, kwargs):
        """(the gates of this forward, the cache of its scaling pass or None)"""
        mixture, cache = self.mixture, find_cache(kwargs.values())
        if not mixture.xlora_config.per_token and "use_cache" in self.names:
            check.value(cache is None, "past_key_values", "a cache", "none: gates of a whole sequence change with it")
            kwargs["use_cache"] = False
        fixed, left = mixture.fixed or (None, 0)
        if self.counts and left:
            mixture.fixed = (fixed, left - 1) if left > 1 else None
        if fixed is not None and cache is None and kwargs.get("use_cache") is False:
            return fixed, None
        half = None if cache is None else _scaling_half(cache, mixture.scaling_mark())
        own = {name: half if value is cache else value for name, value in kwargs.items()}
        own |= {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
        with torch.no_grad(), selected(mixture.owner, *mixture.scaling_pass()):
            output = module.forward(**own)
        if fixed is None:
            fixed = mixture.predict(output.last_hidden_state, kwargs.get("attention_mask"), kwargs.get("input_ids"))
            states = kwargs.get("encoder_hidden_states")
            # once the cache holds their keys and values, the layers that read the encoder's states run no more
            if self.cross and states is not None and not any(getattr(cache, "is_updated", {}).values()):
                each = fixed, mixture.gates_of(mixture.xlora_classifier(states))
                ours, theirs = ([g] * len(mixture.experts) if isinstance(g, torch.Tensor) else g for g in each)
                fixed = tuple(theirs[i] if i in self.cross else g for i, g in enumerate(ours))
        return fixed, find_cache(output.values()) if half is None else half


def find_cache(values):
    """The first transformers cache among these values; None for none."""
    return next((v for v in values if hasattr(v, "get_seq_length")), None)


def _parts(cache):
    """The caches with layers that a cache consists of: two in an encoder-decoder's."""
    return [cache] if hasattr(cache, "layers") else [cache.self_attention_cache, cache.cross_attention_cache]


def _scaling_half(cache, mark):
    """The cache that the scaling pass uses beside `cache`. Raises ValueError for one that no mixture has filled."""
    parts, half = _parts(cache), copy.copy(cache)
    offloads = any(getattr(part, "offloading", False) for part in parts)
    check.value(not offloads, "past_key_values", "an offloaded cache", "one that stays where the model is")
    if len(parts) == 2:
        half.self_attention_cache, half.cross_attention_cache = map(copy.copy, parts)
        # filled by the same forwards as the model's own
        half.is_updated = dict(cache.is_updated)
    for part, own in zip(parts, _parts(half), strict=True):
        start = getattr(part, "scaling_start", None)
        own.layers = copy.deepcopy(part.layers) if start is None else part.layers[start:]
    length, known = int(cache.get_seq_length()), getattr(parts[0], "scaling_mark", None)
    fits = not length or known == mark and int(half.get_seq_length()) == length
    made = "no scaling pass" if known is None else f"a scaling pass over {half.get_seq_length()}, {known}"
    check.value(fits, "past_key_values", f"a cache of {length} tokens with {made}",
                f"an empty one, or one that this mixture has filled: {mark}")  # fmt: skip
    return half
