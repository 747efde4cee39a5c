"""The one table of names: what loralib, loratorch, TheDiscoMole/LoRA and PEFT call a layer's tensors."""


def adopt(layer, state_dict, prefix):
    """Rename, in place, what `state_dict` holds below `prefix` under another library's names to this layer's."""
