"""LoRA on linear layers: y = x Wᵀ + bias + s (D(x) lora_Aᵀ) lora_Bᵀ with s = lora_alpha / r."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from fastlora.nn.fastpath import watch_registrations
from fastlora.nn.layer import Adapter, LoRALayer, check_adapter, identity
from fastlora.nn.switch import is_off, match_rows, rank_list, switch
from fastlora.ops import check, lora_expand, lora_shrink
from fastlora.ops.dropout import draw_seed
from fastlora.ops.linear import lora_linear_op


class LinearLoRA(LoRALayer):
    """What a linear layer's lora_A (r, in) and lora_B (out, r) mean, whatever its base is."""

    kind = "linear"

    def adapter_shapes(self, r):
        named = hasattr(self, "in_features")
        # transformers' Conv1D stores W as (in, out) and has no such names
        out_features, in_features = (self.out_features, self.in_features) if named else self.weight.shape[::-1]
        return (r, in_features), (out_features, r)

    def delta(self, lora_A, lora_B):
        return lora_B @ lora_A

    def forward(self, *args, **kwargs):
        return self.run(None if is_off(self) else self.adapters(), *args, **kwargs)

    def project(self, x, weight, bias, A, B, scaling, gates):
        x, gates = match_rows(x, x.shape[:-1], gates)
        ranks, p = rank_list(A, gates), self.dropout_p()
        seed = draw_seed(x) if p > 0 else None
        return lora_linear_op(x, weight, A, B, scaling, bias, gates, ranks, None, p, seed)


class DenseLoRA(LinearLoRA):
    """The layer whose W is a dense parameter: one op call per forward."""

    def forward(self, x):
        if self.merged or switch.apart or self._ran or self.rank or not self.r:
            return LoRALayer.forward(self, x)
        tensors = self._parameters
        try:
            weight, bias, lora_A, lora_B = tensors["weight"], tensors["bias"], tensors["lora_A"], tensors["lora_B"]
        except KeyError:
            # pruning, FSDP1 and DataParallel keep plain attributes; four of those cost 2 µs, hence the dict first
            weight, bias, lora_A, lora_B = self.weight, self.bias, self.lora_A, self.lora_B
        if self.fan_in_fan_out:
            weight = weight.t()
        if self.training and self.lora_dropout is not identity:
            return self.project(x, weight, bias, (lora_A,), (lora_B,), self.scaling, None)
        return lora_linear_op(x, weight, (lora_A,), (lora_B,), self.scaling, bias, None, (), None, 0.0, None)

    def plain(self, x, weight):
        return F.linear(x, weight, self.bias)

    def adapted(self, x, A, B, scaling, gates):
        return self.project(x, self.base_weight(), self.bias, A, B, scaling, gates)


class OpaqueLoRA(LinearLoRA):
    """The layer whose base is quantised or otherwise not a dense parameter: its own forward, then the update."""

    def check_merge(self, name):
        check.value(False, name, f"a {type(self).__name__}, which has no dense weight", "a layer to merge into")

    def run(self, adapters, x, *args, **kwargs):
        # past LoRALayer's own forward
        base = super(Adapter, self).forward
        if adapters is None:
            return base(x, *args, **kwargs)
        A, B, scaling, gates = adapters
        x, gates = match_rows(x, x.shape[:-1], gates)
        z = lora_shrink(x, A, dropout_p=self.dropout_p(), training=self.training)
        return lora_expand(base(x, *args, **kwargs), z, B, scaling, gates=gates, ranks=rank_list(A, gates))


class Linear(DenseLoRA, nn.Linear):
    """loralib's Linear: the same arguments, initial values and state-dict keys, on the fused op.

    y = x Wᵀ + bias + lora_alpha / r (dropout(x) lora_Aᵀ) lora_Bᵀ; x (..., in_features), W (out_features, in_features),
    stored transposed with `fan_in_fan_out`; lora_A (r, in_features), lora_B (out_features, r); r = 0 is a plain linear
    layer. With `merge_weights`, eval() lets forwards without gradients use W + ΔW, a second tensor: `weight` is never
    written. `kwargs` go to nn.Linear. Raises ValueError naming the argument. Source: Hu et al. 2021, arXiv 2106.09685.
    """

    lora_base = nn.Linear

    def __init__(self, in_features, out_features, r=0, lora_alpha=1, lora_dropout=0.0, fan_in_fan_out=False,
                 merge_weights=True, **kwargs):  # fmt: skip
        watch_registrations()
        super().__init__(in_features, out_features, **kwargs)
        self.adapt(r, lora_alpha, lora_dropout, merge_weights)
        self.fan_in_fan_out = fan_in_fan_out
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T

    def reset_parameters(self):
        # nn.Linear takes its fan-in from dimension 1
        stored, self.weight.data = self.weight.data, self.base_weight().data
        super().reset_parameters()
        self.weight.data = stored


class MergedLinear(Linear):
    """loralib's MergedLinear: a fused linear layer with an adapter on each part that `enable_lora` turns on.

    `enable_lora` has G bools; part j of y, the columns j · out / G to (j + 1) · out / G, gets
    lora_alpha / r (dropout(x) A_jᵀ) B_jᵀ if it is on. The g enabled parts' factors are packed: lora_A
    (r · g, in_features), lora_B (out_features / G · g, r). The forward is one op call. With all parts off, or r = 0, it
    is a plain linear layer. Other arguments and errors as in Linear. Source: Hu et al. 2021, arXiv 2106.09685.
    """

    lora_base = nn.Linear
    kind = "merged"
    forward = LoRALayer.forward

    def __init__(self, in_features, out_features, r=0, lora_alpha=1, lora_dropout=0.0, enable_lora=(False,),
                 fan_in_fan_out=False, merge_weights=True, **kwargs):  # fmt: skip
        given = isinstance(enable_lora, (list, tuple)) and len(enable_lora) > 0
        flags = given and all(isinstance(on, (bool, int)) for on in enable_lora)
        check.value(flags, "enable_lora", repr(enable_lora), "a list of bools")
        even = out_features % len(enable_lora) == 0
        check.value(even, "enable_lora", f"{len(enable_lora)} parts", f"a divisor of out_features = {out_features}")
        # before nn.Module's own initialisation: attach, in it, asks for the shapes
        self.enable_lora = [bool(on) for on in enable_lora]
        check_adapter(r, lora_alpha, lora_dropout)
        given = lora_alpha, lora_dropout, fan_in_fan_out, merge_weights
        super().__init__(in_features, out_features, r if any(self.enable_lora) else 0, *given, **kwargs)

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


def _revive(base, mixins):
    cls = lora_class(base, *mixins)
    return cls.__new__(cls)


def _reduce(self):
    # object has a __getstate__ from Python 3.11 on
    state = getattr(self, "__getstate__", vars(self).copy)()
    return _revive, (type(self).lora_base, type(self).__bases__[:-1]), state


@functools.cache
def lora_class(base, *mixins):
    """The subclass of `base` with an adapter, made once per type; its instances pickle by making it again."""
    body = {"lora_base": base, "__reduce__": _reduce, "__module__": __name__}
    return type(f"LoRA{base.__name__}", (*mixins, base), body)
