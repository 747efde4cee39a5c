"""LoRA on linear layers: y = x Wᵀ + bias + s (D(x) lora_Aᵀ) lora_Bᵀ with s = lora_alpha / r."""

import functools
import operator

import torch
import torch.nn.functional as F
from torch import nn

from fastlora.nn.fastpath import watch_registrations
from fastlora.nn.layer import LoRALayer, check_adapter, identity
from fastlora.nn.switch import is_off, switch
from fastlora.ops import lora_expand, lora_linear, lora_shrink
from fastlora.ops.linear import lora_linear_op


class DenseLoRA(LoRALayer):
    """The layer whose W is a dense parameter: one op call per forward."""

    def forward(self, x):
        if self.merged or switch.off or self._ran_off or not self.r:
            weight = self._lone_weight()
            if weight is not None:
                return F.linear(x, weight, self.bias)
        tensors = self._parameters
        try:
            weight, bias, lora_A, lora_B = tensors["weight"], tensors["bias"], tensors["lora_A"], tensors["lora_B"]
        except KeyError:
            # pruning, FSDP1 and DataParallel keep plain attributes; four of those cost 2 µs, hence the dict first
            weight, bias, lora_A, lora_B = self.weight, self.bias, self.lora_A, self.lora_B
        if self.fan_in_fan_out:
            weight = weight.t()
        if self.training and self.lora_dropout is not identity:
            p = self.dropout_p()
            return lora_linear(x, weight, lora_A, lora_B, self.scaling, bias, dropout_p=p, training=True)
        return lora_linear_op(x, weight, (lora_A,), (lora_B,), self.scaling, bias, None, (), None, 0.0, None)

    def base_weight(self):
        """W as (out, in)."""
        return self.weight.t() if self.fan_in_fan_out else self.weight

    @torch.no_grad()
    def merged_weight(self):
        """W + s lora_B lora_A (out, in), a new tensor in W's dtype, rounded once."""
        if not self.r:
            return self.base_weight().detach().clone()
        wide = torch.promote_types(torch.float32, self.lora_A.dtype)
        update = self.lora_B.to(wide) * self.scaling @ self.lora_A.to(wide)
        return (self.base_weight() + update).to(self.weight.dtype)

    def _lone_weight(self):
        """The weight (out, in) that alone gives this call's y, or None where the op has to run."""
        if not self.r or ((switch.off or self._ran_off) and is_off(self)):
            return self.base_weight()
        if not self.merged:
            return None
        trained = [p for p in self._parameters.values() if p is not None and p.requires_grad]
        if trained and torch.is_grad_enabled():
            # an optimizer step may follow, and fused ones leave `_version` as it was
            self._merged_copy = False
        # a compiled graph cannot look at versions, so it could not tell a stale copy
        if self._merged_copy is False or self.training or torch.compiler.is_compiling():
            return None
        for parameter in trained:
            if parameter.grad is not None:
                return None
        return self._current_copy()

    def _current_copy(self):
        get, copy = self._parameters.get, self._merged_copy
        sources = get("weight"), get("lora_A"), get("lora_B"), self.scaling
        if copy and all(map(operator.is_, sources, copy[1])) and copy[2] == [*map(_stamp, sources)]:
            return copy[0]
        if any(type(t) is not nn.Parameter for t in sources[:3]) or any(t.is_inference() for t in sources):
            return None
        # out of inference mode: a copy made there could not be saved for a backward later
        with torch.inference_mode(False):
            self._merged_copy = self.merged_weight(), sources, [*map(_stamp, sources)]
        return self._merged_copy[0]


def _stamp(t):
    return t._version, t.data_ptr()


class OpaqueLoRA(LoRALayer):
    """The layer whose base is quantised or otherwise not a dense parameter: its own forward, then the update."""

    def forward(self, x, *args, **kwargs):
        y = super().forward(x, *args, **kwargs)
        if (switch.off or self._ran_off) and is_off(self):
            return y
        z = lora_shrink(x, self.lora_A, dropout_p=self.dropout_p(), training=self.training)
        return lora_expand(y, z, self.lora_B, self.scaling)


class Linear(DenseLoRA, nn.Linear):
    """loralib's Linear: the same arguments, initial values and state-dict keys, on the fused op.

    y = x Wᵀ + bias + lora_alpha / r (dropout(x) lora_Aᵀ) lora_Bᵀ; x (..., in_features), W (out_features, in_features),
    stored transposed with `fan_in_fan_out`; lora_A (r, in_features), lora_B (out_features, r); r = 0 is a plain linear
    layer. With `merge_weights`, eval() makes forwards without gradients use W + ΔW, a second tensor: `weight` is never
    written and a state dict always holds the unmerged W. `kwargs` go to nn.Linear. Raises ValueError naming the
    argument. Source: Hu et al. 2021, arXiv 2106.09685.
    """

    lora_base = nn.Linear

    def __init__(
        self, in_features, out_features, r=0, lora_alpha=1, lora_dropout=0.0, fan_in_fan_out=False, merge_weights=True,
        **kwargs,
    ):  # fmt: skip
        check_adapter(r, lora_alpha, lora_dropout)
        watch_registrations()
        super().__init__(in_features, out_features, **kwargs)
        self.merge_weights = merge_weights
        w = self.weight
        self.attach((out_features, in_features), r, lora_alpha, lora_dropout, w.dtype, w.device)
        w.requires_grad = not r
        # W is drawn a second time, as in loralib: the same seed gives the same layer
        self.reset_parameters()
        self.fan_in_fan_out = fan_in_fan_out
        if fan_in_fan_out:
            w.data = w.data.T

    def reset_parameters(self):
        # nn.Linear takes its fan-in from dimension 1
        if self.fan_in_fan_out:
            self.weight.data = self.weight.data.T
        super().reset_parameters()
        if self.fan_in_fan_out:
            self.weight.data = self.weight.data.T


def _revive(mixin, base):
    cls = lora_class(mixin, base)
    return cls.__new__(cls)


def _reduce(self):
    return _revive, (type(self).__bases__[0], type(self).lora_base), self.__getstate__()


@functools.cache
def lora_class(mixin, base):
    """The subclass of `base` with an adapter, made once per type; its instances pickle by making it again."""
    body = {"lora_base": base, "__reduce__": _reduce, "__module__": __name__}
    return type(f"LoRA{base.__name__}", (mixin, base), body)
