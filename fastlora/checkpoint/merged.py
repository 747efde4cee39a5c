"""Checkpoints that were saved while merged: which layers hold W + ΔW in the place of W."""

import torch

from fastlora.ops import check


def unmerged(layers, tensors, base):
    """`tensors` with the weights of `base` for layers with an adapter; ValueError for one that is neither W nor W + ΔW.

    Both are compared within the rounding of the coarsest dtype in play. float32 gets 64 roundings: loralib adds and
    subtracts ΔW at each evaluation, which leaves a trace in W.
    """
    found = dict(tensors)
    for path, layer in layers.items():
        for key, parts in _weights(layer).items():
            name = f"{path}.{key}" if path else key
            adapters = [_adapter(tensors, path, part) for part, _ in parts]
            given = name in tensors and tensors[name].is_floating_point()
            if not given or all(pair is None for pair in adapters):
                continue
            check.value(name in base, "base", f"no {name}", "a state dict of the pretrained model")
            want = base[name]
            got = tensors[name].to(want.device)
            fits = got.shape == want.shape
            check.value(fits, "base", f"{name} of shape {tuple(want.shape)}", tuple(got.shape))
            update, size = _update(layer, want, parts, adapters)
            eps = max(torch.finfo(t.dtype).eps for pair in adapters if pair for t in (got, want, *pair))
            room = max(4 * eps, 2**-17) * (want.double().abs() + size)
            apart = got.double() - want.double()
            same = (apart.abs() <= room).all() or ((apart - update).abs() <= room).all()
            check.value(same, name, f"a weight that is {apart.abs().max():.2g} off the base's",
                        "the base's, or that plus lora_alpha / r ΔW")  # fmt: skip
            found[name] = want
    return found


def _weights(layer):
    """{name of a weight: [(name of an adapter below the layer, layer that holds it or None)]}, in the order of rows."""
    if layer.kind == "projection":
        return {}
    if layer.kind != "attention":
        return {"weight": [("", layer)]}
    each = layer.projections()
    o, q, k, v = [(f"lora_{name}", each.get(name)) for name in "oqkv"]
    if layer._qkv_same_embed_dim:
        return {"out_proj.weight": [o], "in_proj_weight": [q, k, v]}
    return {"out_proj.weight": [o], "q_proj_weight": [q], "k_proj_weight": [k], "v_proj_weight": [v]}


def _adapter(tensors, path, part):
    place = ".".join(name for name in (path, part) if name)
    names = [f"{place}.lora_{x}".lstrip(".") for x in "AB"]
    return tuple(tensors[name] for name in names) if all(name in tensors for name in names) else None


def _update(layer, weight, parts, adapters):
    """lora_alpha / r ΔW in a weight's shape, and the sum of the absolute values that it is made of, in float64."""
    grouped = layer.kind == "conv" and layer.form == "peft" and layer.groups > 1
    blank = weight.new_zeros(weight.shape[0] // len(parts), *weight.shape[1:])
    sums = []
    for factor in (lambda t: t.double().to(weight.device), lambda t: t.double().to(weight.device).abs()):
        rows = []
        for (_, holder), pair in zip(parts, adapters, strict=True):
            # PEFT does not merge a grouped convolution
            none = pair is None or grouped
            delta = blank.double() if none else holder.delta(*map(factor, pair)) * (holder.lora_alpha / holder.r)
            rows.append(delta.t() if holder is not None and holder.fan_in_fan_out else delta)
        sums.append(torch.cat(rows))
    return sums[0], sums[1].abs()
