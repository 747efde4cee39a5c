"""The scaling pass's keys and values, in the cache of the model's own.

Its layers stand behind the model's in the cache's one list of layers: what reorders, crops, repeats, resets or copies
the cache does so to both. `scaling_start` is where they begin, `scaling_mark` whose they are.
"""

import copy

from fastlora.ops import check


def find_cache(values):
    """The first transformers cache among these values; None for none."""
    return next((v for v in values if hasattr(v, "get_seq_length")), None)


def _parts(cache):
    """The caches with layers that a cache consists of: two in an encoder-decoder's."""
    both = getattr(cache, "self_attention_cache", None), getattr(cache, "cross_attention_cache", None)
    return [cache] if both[0] is None else both


def scaling_half(cache, mark):
    """The cache that the scaling pass uses beside `cache`. Raises ValueError for one that no mixture has filled."""
    offloads = any(getattr(part, "offloading", False) for part in _parts(cache))
    check.value(not offloads, "past_key_values", "an offloaded cache", "one that stays where the model is")
    half = _half(cache) if hasattr(cache, "layers") else copy.copy(cache)
    if not hasattr(cache, "layers"):
        half.self_attention_cache, half.cross_attention_cache = map(_half, _parts(cache))
        start = getattr(half.cross_attention_cache, "scaling_start", None)
        half.is_updated = {i - start: done for i, done in cache.is_updated.items() if start and i >= start}
    length, known = int(cache.get_seq_length()), getattr(_parts(cache)[0], "scaling_mark", None)
    fits = not length or known == mark and int(half.get_seq_length()) == length
    made = "no scaling pass" if known is None else f"a scaling pass over {half.get_seq_length()}, {known}"
    check.value(fits, "past_key_values", f"a cache of {length} tokens with {made}",
                f"an empty one, or one that this mixture has filled: {mark}")  # fmt: skip
    return half


def _half(part):
    half, start = copy.copy(part), getattr(part, "scaling_start", None)
    half.layers = copy.deepcopy(part.layers) if start is None else part.layers[start:]
    return half


def join_half(cache, half, mark):
    """Put what the scaling pass has made behind what the model has made."""
    for part, own in zip(_parts(cache), _parts(half), strict=True):
        if not hasattr(part, "scaling_start"):
            part.scaling_start = len(part.layers)
            part.layers.extend(own.layers)
        part.scaling_mark = mark
    if not hasattr(cache, "layers"):
        start = cache.cross_attention_cache.scaling_start
        cache.is_updated.update({start + i: done for i, done in half.is_updated.items()})
