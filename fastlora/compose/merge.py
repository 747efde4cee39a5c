"""One adapter of several: LoraHub's composition of the factors, the exact sum, and PEFT's merges."""

import importlib
import math
import re

import torch
from torch import nn

from fastlora.checkpoint.folder import alpha_of, open_adapter
from fastlora.compose.bank import MODES, named, numbers, padded
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
    layers = _by_layer({name: _read(name, source) for name, source in adapters.items()})
    made = {}
    for held in layers.values():
        A, B = _combined(mode, held, [weights[name] for name in held], options)
        first = next(iter(held.values()))
        made[first.keys[0]], made[first.keys[1]] = A, B if scale == 1 else B / scale
    return made


class _Pair:
    """One adapter's lora_A and lora_B on one layer, their keys, and lora_alpha / r."""

    def __init__(self, found, scaling):
        self.keys, (self.A, self.B) = zip(*(found[letter] for letter in "AB"), strict=True)
        self.r, self.scaling = len(self.A), scaling

    def shape(self):
        """What must be the same for every adapter of the layer."""
        return tuple(self.A.shape[1:]), (len(self.B), *self.B.shape[2:])


def _read(name, source):
    """{layer: _Pair} of an adapter."""
    config, tensors = open_adapter(source)
    found, where = {}, f"adapters[{name!r}]"
    for key, tensor in tensors.items():
        match = re.fullmatch(r"((?:.+\.)?)lora_([AB])", from_any_name(key))
        check.value(match, where, f"the tensor {key!r}", "lora_A and lora_B alone")
        found.setdefault(match[1].rstrip("."), {})[match[2]] = key, tensor
    check.value(found, where, "no tensor", "lora_A and lora_B")
    pairs = {}
    for path, letters in found.items():
        both = len(letters) == 2
        check.value(both, where, f"lora_{min(letters)} alone at {path!r}", "lora_A and lora_B")
        (_, A), (_, B) = letters["A"], letters["B"]
        fits = min(A.dim(), B.dim()) > 1 and len(A) == B.shape[1]
        got = f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} at {path!r}"
        check.value(fits, where, got, "(r, in) and (out, r)")
        pairs[path] = _Pair(letters, alpha_of(config, path, len(A)) / len(A))
    return pairs


def _by_layer(read):
    """{layer: {adapter's name: _Pair}}; ValueError for an adapter of another model."""
    layers = {}
    for name, pairs in read.items():
        common = not layers or any(path in layers for path in pairs)
        got, own = (sorted(paths)[0] for paths in (pairs, layers or pairs))
        check.value(common, f"adapters[{name!r}]", f"layers such as {got!r}", f"the others', such as {own!r}")
        for path, pair in pairs.items():
            held = layers.setdefault(path, {})
            first = next(iter(held.values()), pair)
            check.value(pair.shape() == first.shape(), f"adapters[{name!r}]", f"sizes {pair.shape()} at {path!r}",
                        f"{first.shape()}, as the others")  # fmt: skip
            held[name] = pair
    return layers


def _combined(mode, held, weights, options):
    """lora_A and lora_B of one layer."""
    pairs = list(held.values())
    if mode in PEFT_MODES:
        return _by_peft(mode, pairs, weights, options)
    scaled = [pair.B if pair.scaling == 1 else pair.B * pair.scaling for pair in pairs]
    if mode == "sum":
        A = torch.cat([pair.A for pair in pairs])
        return A, torch.cat([weight * B for weight, B in zip(weights, scaled, strict=True)], 1)
    r = max(pair.r for pair in pairs)
    factors = zip(*(padded(pair.A, B, r) for pair, B in zip(pairs, scaled, strict=True)), strict=True)
    return [sum(w * t for w, t in zip(weights, each, strict=True)) for each in factors]


def _by_peft(mode, pairs, weights, options):
    """What PEFT's own add_weighted_adapter makes, on a model of this one layer."""
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ImportError(f"fastlora: the mode {mode!r} needs PEFT: pip install peft") from error
    A, B = pairs[0].A, pairs[0].B
    got = f"lora_A {tuple(A.shape)} of {pairs[0].keys[0]}"
    check.value(A.dim() == 2, "adapters", got, f"linear layers' in the mode {mode!r}")
    # its memory is never touched
    layer = nn.utils.skip_init(nn.Linear, A.shape[1], len(B), bias=False, device=A.device)
    names, model = [f"{i}" for i in range(len(pairs))], nn.ModuleDict({"fc": layer})
    configs = [peft.LoraConfig(r=p.r, lora_alpha=p.scaling * p.r, target_modules=["fc"]) for p in pairs]
    # what dare_* draw is a merge's alone
    with torch.random.fork_rng(devices=[]):
        tuner = peft.LoraModel(model, configs[0], names[0])
        for name, config in zip(names[1:], configs[1:], strict=True):
            tuner.peft_config[name] = config
            tuner.inject_adapter(model, name)
    for name, pair in zip(names, pairs, strict=True):
        model["fc"].lora_A[name].weight.copy_(pair.A)
        model["fc"].lora_B[name].weight.copy_(pair.B)
    tuner.add_weighted_adapter(names, weights, "merged", combination_type=mode, **options)
    return [model["fc"].get_submodule(f"lora_{x}")["merged"].weight.detach().to(A.dtype) for x in "AB"]
