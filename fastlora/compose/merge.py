"""One adapter of several: LoraHub's composition of the factors, the exact sum, and PEFT's merges."""

import collections
import math
import re

import torch
from torch import nn

from fastlora.checkpoint.folder import alpha_of, open_adapter
from fastlora.compose.bank import MODES, named, numbers, stacked
from fastlora.nn.names import from_any_name
from fastlora.ops import check

_NEEDS_DENSITY = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
PEFT_MODES = ("linear", "cat", "svd", *_NEEDS_DENSITY, *(f"{mode}_svd" for mode in _NEEDS_DENSITY))


@torch.no_grad()
def compose(adapters, weights, mode="lorahub", scale=1.0, **options):
    """One adapter of several, with weights w_i: {key: tensor} with the first adapter's keys, then the others'.

    `adapters`: {name: folder in PEFT's format or tensors by name}, or a list; `weights`: a list, or by name. An
    adapter's lora_alpha / r, 1 for tensors, is in the result, which runs at `scale` = lora_alpha / r. Modes:

    "lorahub"  lora_A = Σ w_i a_i, lora_B = Σ w_i b_i: products of different adapters too. Smaller ranks get zeros.
    "sum"      the stacked factors of Σ w_i b_i a_i, of rank Σ r_i
    "linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", the last four with "_svd": what
               PEFT's add_weighted_adapter makes, with its `options` density, majority_sign_method, svd_rank, …;
               dare_* draw from torch's generator

    An adapter that lacks a layer adds nothing there. Raises ValueError naming what was expected, ImportError without
    PEFT. Sources: Huang et al. 2023, arXiv 2307.13269; PEFT.
    """
    adapters = named(adapters)
    check.value(mode in (*MODES, *PEFT_MODES), "mode", repr(mode), f"one of {', '.join((*MODES, *PEFT_MODES))}")
    check.value(scale != 0 and math.isfinite(scale), "scale", scale, "a finite number other than 0")
    check.value(not options or mode in PEFT_MODES, "options", list(options), f"none in the mode {mode!r}")
    dense = mode.removesuffix("_svd") not in _NEEDS_DENSITY or options.get("density") is not None
    check.value(dense, "density", None, f"a number from 0 to 1 in the mode {mode!r}")
    weights = numbers(weights, adapters)
    made = {}
    for held in _by_layer({name: _read(name, source) for name, source in adapters.items()}).values():
        pairs, own = list(held.values()), [weights[name] for name in held]
        scaled = [(pair.A, pair.B * pair.scaling) for pair in pairs]
        if mode in PEFT_MODES:
            A, B = _by_peft(mode, pairs, own, options)
        elif mode == "sum":
            weighted = [(A, weight * B) for weight, (A, B) in zip(own, scaled, strict=True)]
            A, B = (torch.cat(each, dim) for dim, each in enumerate(zip(*weighted, strict=True)))
        else:
            A, B = (sum(w * t for w, t in zip(own, each, strict=True)) for each in stacked(scaled))
        made.update(zip(pairs[0].keys, (A, B / scale), strict=True))
    return made


# one adapter on one layer: its keys, lora_A, lora_B, lora_alpha / r, and the sizes that are the same for all adapters
_Pair = collections.namedtuple("_Pair", ["keys", "A", "B", "scaling", "sizes"])


def _read(name, source):
    """{layer: _Pair} of an adapter."""
    config, tensors = open_adapter(source)
    found, where, pairs = {}, f"adapters[{name!r}]", {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(?:(.+)\.)?lora_([AB])", from_any_name(key))
        check.value(match, where, f"the tensor {key!r}", "lora_A and lora_B alone")
        found.setdefault(match[1] or "", {})[match[2]] = key, tensor
    check.value(found, where, "no tensor", "lora_A and lora_B")
    for path, letters in found.items():
        check.value(len(letters) == 2, where, f"lora_{min(letters)} alone at {path!r}", "lora_A and lora_B")
        keys, (A, B) = zip(letters["A"], letters["B"], strict=True)
        got = f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} at {path!r}"
        check.value(min(A.dim(), B.dim()) > 1 and len(A) == B.shape[1], where, got, "(r, in) and (out, r)")
        sizes = tuple(A.shape[1:]), (len(B), *B.shape[2:])
        pairs[path] = _Pair(keys, A, B, alpha_of(config, path, len(A)) / len(A), sizes)
    return pairs


def _by_layer(read):
    """{layer: {adapter's name: _Pair}}; ValueError for an adapter of another model."""
    layers = {}
    for name, pairs in read.items():
        got, own = (min(paths) for paths in (pairs, layers or pairs))
        common = not layers or layers.keys() & pairs.keys()
        check.value(common, f"adapters[{name!r}]", f"layers such as {got!r}", f"the others', such as {own!r}")
        for path, pair in pairs.items():
            held = layers.setdefault(path, {})
            first = next(iter(held.values()), pair)
            got, expected = f"sizes {pair.sizes} at {path!r}", f"{first.sizes}, as the others"
            check.value(pair.sizes == first.sizes, f"adapters[{name!r}]", got, expected)
            held[name] = pair
    return layers


def _by_peft(mode, pairs, weights, options):
    """What PEFT's own add_weighted_adapter makes, on a model of this one layer."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"fastlora: the mode {mode!r} needs PEFT: pip install peft") from error
    A, B = pairs[0].A, pairs[0].B
    got = f"lora_A {tuple(A.shape)} of {pairs[0].keys[0]}"
    check.value(A.dim() == 2, "adapters", got, f"linear layers' in the mode {mode!r}")
    # its memory is never touched
    layer = nn.utils.skip_init(nn.Linear, A.shape[1], len(B), bias=False, device=A.device)
    made = {f"{i}": (pair, peft.LoraConfig(r=len(pair.A), lora_alpha=pair.scaling * len(pair.A), target_modules=["fc"]))
            for i, pair in enumerate(pairs)}  # fmt: skip
    # what dare_* draw is a merge's alone
    with torch.random.fork_rng(devices=[]):
        tuner = peft.LoraModel(nn.ModuleDict({"fc": layer}), {name: config for name, (_, config) in made.items()}, "0")
        for name in list(made)[1:]:
            tuner.inject_adapter(tuner.model, name)
    layer = tuner.model["fc"]
    for name, (pair, _) in made.items():
        layer.lora_A[name].weight.copy_(pair.A)
        layer.lora_B[name].weight.copy_(pair.B)
    tuner.add_weighted_adapter(list(made), weights, "merged", combination_type=mode, **options)
    return [factors["merged"].weight.detach().to(A.dtype) for factors in (layer.lora_A, layer.lora_B)]
