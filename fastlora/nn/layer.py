"""What every LoRA layer shares: the adapter's parameters, its scale, and the lazily merged weight."""

import math

import torch
from torch import nn

from fastlora.ops import check


def identity(x):
    """What `lora_dropout` is at p = 0: a module-level function, so that layers pickle."""
    return x


def check_adapter(r, lora_alpha, lora_dropout, least=0):
    """Raise ValueError for an adapter that cannot be built."""

    def finite(number):
        return isinstance(number, (int, float)) and math.isfinite(number)

    whole = isinstance(r, int) and not isinstance(r, bool) and r >= least
    check.value(whole, "r", repr(r), f"an integer of at least {least}")
    check.value(finite(lora_alpha), "lora_alpha", repr(lora_alpha), "a finite number")
    share = finite(lora_dropout) and 0 <= lora_dropout <= 1
    check.value(share, "lora_dropout", repr(lora_dropout), "a number from 0 to 1")


class LoRALayer:
    """An adapter on a module, mixed in before its torch class: r, lora_alpha, lora_dropout, lora_A, lora_B, scaling.

    `scaling` is a float32 tensor and no buffer: it follows the device but never the dtype (4/3 in bfloat16 is 1.336).
    `merged` says that W + ΔW may be used where no gradient is asked of the adapter; W itself is never written.
    """

    r = 0
    merged = False
    merge_weights = False
    fan_in_fan_out = False
    # None: not built; False: not before the next train(), eval(), merge or refresh; else (W + ΔW, sources, stamps)
    _merged_copy = None
    _ran_off = False

    def attach(self, shape, r, lora_alpha, lora_dropout, dtype, device):
        """Give this module an adapter for W of `shape` (out, in), not yet initialised; none at r = 0."""
        self.r, self.lora_alpha = r, lora_alpha
        self.lora_dropout = nn.Dropout(lora_dropout).train(self.training) if lora_dropout > 0 else identity
        if r:
            out_features, in_features = shape
            self.lora_A = nn.Parameter(torch.empty((r, in_features), dtype=dtype, device=device))
            self.lora_B = nn.Parameter(torch.empty((out_features, r), dtype=dtype, device=device))
            self.scaling = torch.empty((), dtype=torch.float32, device="cpu" if device.type == "meta" else device)

    def reset_lora_parameters(self):
        """lora_A as nn.Linear's weight is initialised, lora_B zero, scaling lora_alpha / r."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        self.set_scale(1.0)

    def reset_parameters(self):
        """Initialise everything again, as after `to_empty`."""
        base = getattr(super(), "reset_parameters", None)
        if base:
            base()
        if "lora_A" in self._parameters:
            self.reset_lora_parameters()
        self.refresh()

    def set_scale(self, scale):
        """Scale the update by scale · lora_alpha / r, in place: compiled code and captured graphs see it."""
        self.scaling.fill_(scale * self.lora_alpha / self.r)

    def refresh(self):
        """Drop the merged copy; the next merged forward builds it from what the tensors hold then."""
        self._merged_copy = None

    def train(self, mode=True):
        super().train(mode)
        # with merge_weights eval() merges, as in loralib; without, only train() acts: it ends what merge(model) began
        self.merged = not mode if self.merge_weights else self.merged and not mode
        self._ran_off = False
        self.refresh()
        return self

    def _apply(self, fn, *args, **kwargs):
        super()._apply(fn, *args, **kwargs)
        if self.r:
            # only the device of fn's result: its dtype would round the scale, to_empty's would lose it
            device = fn(self.scaling).device
            self.scaling = self.scaling.to("cpu" if device.type == "meta" else device)
        self.refresh()
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    def __getstate__(self):
        return {**self.__dict__, "_merged_copy": None}

    def extra_repr(self):
        return f"{super().extra_repr()}, r={self.r}" + (f", lora_alpha={self.lora_alpha}" if self.r else "")

    def dropout_p(self):
        """The probability in force, from the nn.Dropout that programs may change."""
        dropout = self.lora_dropout
        return dropout.p if dropout is not identity and dropout.training else 0.0
