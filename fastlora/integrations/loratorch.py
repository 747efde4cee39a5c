"""loratorch's names: `import fastlora.integrations.loratorch as lora` in the place of `import loratorch as lora`."""

from fastlora import checkpoint
from fastlora.model import mark_only_lora_as_trainable, print_trainable_parameters
from fastlora.nn import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoRALayer, MergedLinear, MultiheadAttention

__all__ = [
    "Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoRALayer", "MergedLinear", "MultiheadAttention",
    "lora_state_dict", "mark_only_lora_as_trainable", "print_trainable_parameters",
    "register_model_param_after_backward",
]  # fmt: skip


def lora_state_dict(model, bias="none"):
    """The adapters' entries of the model's state dict under loratorch's names, with biases as `bias` says."""
    return checkpoint.lora_state_dict(model, bias, names="loratorch")


def register_model_param_after_backward(model):
    """Nothing to do: a forward here does not take the parameters out of the model, as loratorch's does."""
