"""transformers' Conv1D (GPT-2): a linear layer with its weight stored (in, out)."""

from transformers.pytorch_utils import Conv1D

from fastlora.nn.convert import register_linear

register_linear(Conv1D, fan_in_fan_out=True)
