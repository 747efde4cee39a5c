"""‖W + Σ s lora_B lora_A‖ of each row of W: what DoRA divides its magnitudes by."""

import torch

from fastlora.ops import check
from fastlora.ops.dropout import wide
from fastlora.ops.expand import add_update, expand_gate
from fastlora.ops.library import define, scalar
from fastlora.ops.shrink import join


def lora_norm(weight, lora_A, lora_B, scaling=1.0):
    """The norms n_i = ‖(W + Σ_e s_e lora_B_e lora_A_e)_i‖₂ of an adapted weight's rows.

    weight (out, in); lora_A (r, in) and lora_B (out, r), or sequences; `scaling` a number, a 0-d or an (E,) tensor.
    Returns (out,) in float32 (float64 for float64), without a gradient: DoRA's `column_scale` is magnitude / n, of
    which n counts as a constant (Liu et al. 2024, arXiv 2402.09353). Raises ValueError or TypeError by name.
    """
    A, B, scaling = check.tensors("lora_A", lora_A), check.tensors("lora_B", lora_B), scalar(scaling)
    ranks = [a.shape[:1].numel() for a in A]
    check.tensor("weight", weight, weight, (None, None))
    check.linear(weight, weight, A, B, scaling, None, None, ranks, None, 0.0, None)
    with torch.no_grad():
        return lora_norm_op(weight, A, B, scaling, ranks)


def lora_norm_reference(weight, lora_A, lora_B, scaling, ranks):
    w = weight.T.to(wide(weight))
    g = expand_gate(scaling, None, ranks, w.device, w.dtype)
    return add_update(w, join([a.T.to(w.dtype) for a in lora_A], w, w.dtype), lora_B, g).norm(dim=0)


lora_norm_op = define(
    "lora_norm", "Tensor weight, Tensor[] lora_A, Tensor[] lora_B, Tensor scaling, int[] ranks", "Tensor",
    lambda weight, *_: weight.new_empty(weight.shape[0], dtype=wide(weight)), reference=lora_norm_reference,
)  # fmt: skip
