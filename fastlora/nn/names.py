"""The one table of names: what loralib, loratorch, TheDiscoMole/LoRA and PEFT call a layer's tensors.

here, loralib      model.layers.0.q_proj.lora_A                            (r, in)
PEFT, in a file    base_model.model.model.layers.0.q_proj.lora_A.weight    (r, in)
PEFT, in memory    base_model.model.model.layers.0.q_proj.lora_A.default.weight
base tensors       model.layers.0.q_proj.bias  <->  base_model.model.model.layers.0.q_proj.base_layer.bias
"""

import re


def adopt(layer, state_dict, prefix):
    """Rename, in place, what `state_dict` holds below `prefix` under another library's names to this layer's."""


def from_any_name(key):
    """The name here of a tensor that loralib, PEFT's files or a PEFT model call `key`."""
    key = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return re.sub(r"((?:^|\.)lora_[AB])(\.\w+)?\.weight$", r"\1", key)


def to_tasks(kind, lora_A, lora_B):
    """TheDiscoMole/LoRA's A (out, r) and B (r, in), views: the letters are the other way round there."""
    return (lora_A.mT, lora_B.mT) if kind == "embedding" else (lora_B, lora_A)


def from_tasks(kind, A, B):
    """lora_A and lora_B of TheDiscoMole/LoRA's A and B, either of which may be None."""
    if kind == "embedding":
        return tuple(t if t is None else t.mT for t in (A, B))
    return B, A
