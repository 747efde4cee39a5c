"""LoRA on chosen parts of a fused linear layer, such as q and v of q/k/v."""

import torch
from torch import nn

from fastlora.nn.layer import LoRALayer, check_adapter
from fastlora.nn.linear import DenseLoRA, Linear
from fastlora.ops import check


class MergedLoRA(DenseLoRA):
    """A linear layer of len(enable_lora) equal parts; each enabled part has its own r rows of lora_A and of lora_B."""

    kind = "merged"
    stacks = False
    forward = LoRALayer.forward

    def adapter_shapes(self, r):
        groups = sum(self.enable_lora)
        return (r * groups, self.in_features), (self.out_features // len(self.enable_lora) * groups, r)

    def narrow(self, lora_A, lora_B, start, stop):
        rows = lora_A.unflatten(0, (sum(self.enable_lora), -1))[:, start:stop]
        return rows.flatten(0, 1), lora_B[:, start:stop]

    def delta(self, lora_A, lora_B):
        return self.block_form(lora_B) @ lora_A

    def adapted(self, x, A, B, scaling, gates):
        if gates is not None and gates.shape[-1] == self.r and len(A) == 1:
            # a gate for each rank row, the same in each part
            gates = gates.repeat(1, sum(self.enable_lora))
        return super().adapted(x, A, tuple(map(self.block_form, B)), scaling, gates)

    def block_form(self, lora_B):
        """lora_B (out / G · g, r) as (out, g · r): each enabled part's rows see their own rows of lora_A alone."""
        parts = iter(lora_B.chunk(sum(self.enable_lora)))
        size = self.out_features // len(self.enable_lora)
        return torch.block_diag(*(next(parts) if on else lora_B.new_empty(size, 0) for on in self.enable_lora))


class MergedLinear(MergedLoRA, Linear):
    """loralib's MergedLinear: a fused linear layer with an adapter on each part that `enable_lora` turns on.

    `enable_lora` has G bools; part j of y, the columns j · out / G to (j + 1) · out / G, gets
    lora_alpha / r (dropout(x) A_jᵀ) B_jᵀ if it is on. The g enabled parts' factors are packed: lora_A
    (r · g, in_features), lora_B (out_features / G · g, r). The forward is one op call, ΔW is not built. With all parts
    off, or r = 0, it is a plain linear layer. Other arguments as in Linear. Raises ValueError naming the argument.
    Source: Hu et al. 2021, arXiv 2106.09685.
    """

    lora_base = nn.Linear

    def __init__(
        self, in_features, out_features, r=0, lora_alpha=1, lora_dropout=0.0, enable_lora=(False,),
        fan_in_fan_out=False, merge_weights=True, **kwargs,
    ):  # fmt: skip
        given = isinstance(enable_lora, (list, tuple)) and len(enable_lora) > 0
        flags = given and all(isinstance(on, (bool, int)) for on in enable_lora)
        check.value(flags, "enable_lora", repr(enable_lora), "a list of bools")
        even = out_features % len(enable_lora) == 0
        check.value(even, "enable_lora", f"{len(enable_lora)} parts", f"a divisor of out_features = {out_features}")
        # before nn.Module's own initialisation: attach, in it, asks for the shapes
        self.enable_lora = [bool(on) for on in enable_lora]
        check_adapter(r, lora_alpha, lora_dropout)
        r = r if any(self.enable_lora) else 0
        given = r, lora_alpha, lora_dropout, fan_in_fan_out, merge_weights
        super().__init__(in_features, out_features, *given, **kwargs)
