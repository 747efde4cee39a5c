"""LoRA on convolutions, in three forms.

loralib  y = conv(x, W + s ΔW) + bias with ΔW = (lora_B lora_A) viewed in W's shape; 1, 2 and 3 dimensions pack their
         kernel into the factors in loralib's and loratorch's shapes
peft     y = conv(x, W) + bias + s lora_B lora_A(x): lora_A a convolution down to r channels with W's kernel, stride,
         padding and dilation, lora_B 1×1 up: the formula of the linear layer with channels last
tasks    as loralib, with a factor pair for each kernel position, TheDiscoMole/LoRA's shapes
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastlora.nn.layer import LoRALayer
from fastlora.nn.switch import match_rows, rank_list
from fastlora.ops import check
from fastlora.ops.expand import lora_expand_op

FORMS = ("loralib", "peft", "tasks")
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvLoRA(LoRALayer):
    """What a convolution's lora_A and lora_B mean, by `form`."""

    kind = "conv"
    form = "peft"

    def check_base(self, r):
        fits = r is None or getattr(self, "form", ConvLoRA.form) != "peft" or r % self.groups == 0
        check.value(fits, "r", r, f"a multiple of groups = {self.groups}, in the form 'peft'")

    def check_merge(self, name):
        got = f"a {type(self).__name__} in the form 'peft' with groups = {self.groups}"
        check.value(self.form != "peft" or self.groups == 1, name, got, "groups = 1: this ΔW is no grouped weight")

    # the layer itself: loralib keeps the convolution under this name
    conv = property(lambda self: self)

    def adapter_shapes(self, r):
        out, inner, k, groups = self.out_channels, self.in_channels, self.kernel_size, self.groups
        # also of a plain convolution
        form = getattr(self, "form", ConvLoRA.form)
        if form == "peft":
            return (r, inner, *k), (out, r // groups, *(1 for _ in k))
        if form == "tasks":
            return (*k, r, inner // groups), (*k, out, r)
        high = k[0] if len(k) > 1 else 1
        return (r * k[0], inner * math.prod(k) // high), (out // groups * high, r * k[0])

    def narrow(self, lora_A, lora_B, start, stop):
        if self.form == "tasks":
            return lora_A[..., start:stop, :], lora_B[..., start:stop]
        if self.form == "peft":
            check.value(self.groups == 1, "rank", f"a part of r with groups = {self.groups}", "all components")
        each = 1 if self.form == "peft" else self.kernel_size[0]
        return super().narrow(lora_A, lora_B, start * each, stop * each)

    def delta(self, lora_A, lora_B):
        if self.form != "peft":
            return (lora_B @ lora_A).view(self.weight.shape)
        self.check_merge("model")
        return torch.einsum("or,ri...->oi...", lora_B.flatten(1), lora_A)

    def plain(self, x, weight):
        return self._conv_forward(x, weight, self.bias)

    def adapted(self, x, A, B, scaling, gates):
        batched = x.dim() == len(self.kernel_size) + 2
        x, gates = match_rows(x, x.shape[:1] if batched else (), gates)
        if self.form == "peft":
            return self._down_and_up(x, A, B, scaling, gates)
        dropped, by_row = self.dropout_p() > 0, gates is not None and gates.dim() > 1
        if not dropped and not by_row:
            # rounded once, as the merged weight is
            return self.plain(x, (self.weight + self.update(A, B, scaling, gates)).to(self.weight.dtype))
        y, d = self.plain(x, self.weight), self.lora_dropout(x)
        if by_row:
            return y + self._by_row(d, A, B, scaling, gates)
        return y + self._convolve(d, self.update(A, B, scaling, gates).to(x.dtype), self.groups)

    def _convolve(self, x, weight, groups):
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return _CONV[len(self.kernel_size)](x, weight, None, self.stride, padding, self.dilation, groups)

    def _down_and_up(self, x, A, B, scaling, gates):
        channels = -1 - len(self.kernel_size)
        down = A[0] if len(A) == 1 else torch.cat(A)
        z = self._convolve(self.lora_dropout(x), down.to(x.dtype), 1).movedim(channels, -1)
        if gates is not None and gates.dim() > 1:
            gates = gates.view(gates.shape[0], *(1 for _ in self.kernel_size), -1)
        base = self.plain(x, self.weight)
        # the kernels copy strided tensors anyway, and Inductor fails on those with symbolic sizes
        y, z = base.movedim(channels, -1).contiguous(), z.contiguous()
        y = lora_expand_op(y, z, self.up(B), scaling, gates, rank_list(A, gates), (), None).movedim(-1, channels)
        # a view with channels last would break a program's y.view(len(y), -1)
        return y.contiguous() if base.is_contiguous() else y

    def up(self, B):
        """The adapters' lora_B as (out, r), each group's rows with their own columns."""
        flat = [b.flatten(1) for b in B]
        return flat if self.groups == 1 else [torch.block_diag(*b.chunk(self.groups)) for b in flat]

    def _by_row(self, x, A, B, scaling, gates):
        """Σ gate[row, e] · scale_e · conv(x, ΔW_e): one convolution with the adapters' ΔW side by side."""
        if gates.shape[1] != len(A):
            A, B = zip(*(self.narrow(A[0], B[0], i, i + 1) for i in range(gates.shape[1])), strict=True)
        deltas = torch.stack([self.delta(a, b) for a, b in zip(A, B, strict=True)]).to(x.dtype)
        weight = deltas.unflatten(1, (self.groups, -1)).transpose(0, 1).flatten(0, 2)
        each = self._convolve(x, weight, self.groups).unflatten(1, (self.groups, len(A), -1))
        return torch.einsum("nge...,ne->ng...", each, (gates * scaling).to(x.dtype)).flatten(1, 2)


class _Convolution(ConvLoRA):
    def __init__(self, in_channels, out_channels, kernel_size, r=0, lora_alpha=1, lora_dropout=0.0,
                 merge_weights=True, form="loralib", **kwargs):  # fmt: skip
        check.value(form in FORMS, "form", repr(form), f"one of {', '.join(FORMS)}")
        super().__init__(in_channels, out_channels, kernel_size, **kwargs)
        self.form = form
        self.adapt(r, lora_alpha, lora_dropout, merge_weights and (form != "peft" or self.groups == 1))


class Conv1d(_Convolution, nn.Conv1d):
    """loralib's Conv1d, for any kernel: y = conv1d(x, W + lora_alpha / r ΔW) + bias, or PEFT's form.

    x (N, in, L) or (in, L). `form` "loralib": ΔW = lora_B lora_A viewed as W (out, in / groups, k), lora_A (r·k, in·k),
    lora_B (out / groups, r·k), where loralib's own shapes fail for k > 1. "peft": lora_A (r, in, k), a convolution down
    to r channels, lora_B (out, r / groups, 1) up. "tasks": lora_A (k, r, in / groups), lora_B (k, out, r). Dropout acts
    on the adapter's x. `kwargs` go to nn.Conv1d. Raises ValueError naming the argument. Source: loralib 0.1.2.
    """

    lora_base = nn.Conv1d


class Conv2d(_Convolution, nn.Conv2d):
    """loralib's Conv2d, for any kernel: as Conv1d, with x (N, in, H, W) or (in, H, W).

    `form` "loralib": lora_A (r·k, in·l), lora_B (out / groups · k, r·k). "peft": lora_A (r, in, k, l), lora_B
    (out, r / groups, 1, 1). "tasks": lora_A (k, l, r, in / groups), lora_B (k, l, out, r).
    """

    lora_base = nn.Conv2d


class Conv3d(_Convolution, nn.Conv3d):
    """loralib's Conv3d, for any kernel: as Conv1d, with x (N, in, D, H, W) or (in, D, H, W).

    loralib's shapes fail for k > 1; `form` "loralib": lora_A (r·k, in·l·m), lora_B (out / groups · k, r·k). "peft":
    lora_A (r, in, k, l, m), lora_B (out, r / groups, 1, 1, 1). "tasks": (k, l, m, r, in / groups), (k, l, m, out, r).
    """

    lora_base = nn.Conv3d
