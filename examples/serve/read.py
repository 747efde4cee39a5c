"""An adapter from outside, checked against the model before the pool changes."""

from typing import NamedTuple

import torch

from fastlora.checkpoint.folder import read_adapter
from fastlora.nn.convert import dense_weight
from fastlora.ops import check


class Pair(NamedTuple):
    """An adapter on one layer, on the host, in the pool's dtype; `column` is DoRA's c − 1 or None."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scale: float
    column: torch.Tensor | None


@torch.no_grad()
def read(model, layers, source, max_rank, dtype, unsafe):
    """{layer: Pair} of a folder in PEFT's format, or of tensors by name. Raises ValueError for what a pool cannot hold.

    DoRA's c = m / ‖W + s lora_B lora_A‖ is computed here, once (Liu et al. 2024, arXiv 2402.09353).
    """
    plan, config, base = read_adapter(model, source, dora=True, unsafe=unsafe)
    check.value(not base, "source", "biases that were trained with the adapter", "an adapter alone")
    magnitudes, pairs = config.get("magnitudes", {}), {}
    for name, planned in plan.items():
        check.value(name in layers, name, "an adapter", f"one on a dense linear layer ({len(layers)} of them here)")
        check.value(planned.r <= max_rank, name, f"rank {planned.r}", f"at most max_rank = {max_rank}")
        A, B, column, alpha = planned.lora_A.float(), planned.lora_B.float(), None, planned.lora_alpha
        known = isinstance(alpha, (int, float)) and abs(alpha) < 1e30
        check.value(known, name, f"lora_alpha {alpha!r:.20}", "a finite number")
        scale = float(alpha) / planned.r
        if name in magnitudes:
            weight = dense_weight(layers[name]).float().cpu()
            column = magnitudes[name].float().flatten() / (weight + scale * B @ A).norm(dim=1) - 1
        pair = [None if t is None else t.to(dtype) for t in (A, B, column)]
        finite = all(t is None or bool(t.isfinite().all()) for t in pair)
        check.value(finite, name, "infinity or NaN", f"numbers that {dtype} holds")
        pairs[name] = Pair(pair[0], pair[1], scale, pair[2])
    missing = sorted(set(magnitudes) - set(plan))
    check.value(not missing, "lora_magnitude_vector", missing[:3], "magnitudes of layers that have an adapter")
    return pairs
