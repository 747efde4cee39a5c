"""What every LoRA layer shares: the adapter's parameters, its scale and rank, and the lazily merged weight."""

import math
import operator
import weakref

import torch
from torch import nn

from fastlora.nn import names
from fastlora.nn.switch import is_off, switch
from fastlora.ops import check


def identity(x):
    """What `lora_dropout` is at p = 0: a module-level function, so that layers pickle."""
    return x


def whole(number):
    return isinstance(number, int) and not isinstance(number, bool)


def check_adapter(r, lora_alpha, lora_dropout, least=0):
    check.value(whole(r) and r >= least, "r", repr(r), f"an integer of at least {least}")
    finite = isinstance(lora_alpha, (int, float)) and math.isfinite(lora_alpha)
    check.value(finite, "lora_alpha", repr(lora_alpha), "a finite number")
    share = isinstance(lora_dropout, (int, float)) and 0 <= lora_dropout <= 1
    check.value(share, "lora_dropout", repr(lora_dropout), "a number from 0 to 1")


# the layers with a rank of their own
ranked_layers = weakref.WeakSet()


class Adapter:
    """One adapter's parameters, mixed into a module: r, lora_alpha, lora_A, lora_B, scaling.

    `scaling` is a float32 tensor and no buffer: it follows the device but never the dtype (4/3 in bfloat16 is 1.336).
    """

    r = 0
    # DyLoRA: how many of the r components are in force, None for all; with `frozen` only the last of them trains
    rank = None
    frozen = False
    _factor = 1.0

    def attach_factors(self, shapes, r, lora_alpha, dtype, device):
        """Give this module lora_A and lora_B of these shapes, not yet initialised, and its scale; none at r = 0."""
        self.r, self.lora_alpha = r, lora_alpha
        if r:
            self.lora_A, self.lora_B = (nn.Parameter(torch.empty(s, dtype=dtype, device=device)) for s in shapes)
            device = "cpu" if device.type == "meta" else device
            self.scaling = torch.tensor(lora_alpha / r, dtype=torch.float32, device=device)

    def set_scale(self, scale):
        """Scale the update by scale · lora_alpha / rank, in place: compiled code and captured graphs see it."""
        self._factor = scale
        self.scaling.fill_(scale * self.lora_alpha / (self.rank or self.r))

    def _apply(self, fn, *args, **kwargs):
        super()._apply(fn, *args, **kwargs)
        if self.r and hasattr(self, "scaling"):
            # only the device of fn's result: its dtype would round the scale, to_empty's would lose it
            device = fn(self.scaling).device
            self.scaling = self.scaling.to("cpu" if device.type == "meta" else device)
        return self

    def extra_repr(self):
        own = f"r={self.r}, lora_alpha={self.lora_alpha}" if self.r else "r=0"
        return ", ".join(filter(None, [super().extra_repr(), own]))


class LoRALayer(Adapter):
    """An adapter on a module, mixed in before its torch class: r, lora_alpha, lora_dropout, lora_A, lora_B, scaling.

    `merged` says that W + ΔW may be used where no gradient is asked of the adapter; W itself is never written. A kind
    of layer defines `adapter_shapes`, `init_adapter`, `narrow` and `delta` (what its lora_A and lora_B mean), `plain`
    (its forward with a given weight) and `adapted` (its forward with adapters).
    """

    holds_adapters = True
    merged = False
    merge_weights = False
    fan_in_fan_out = False
    # None: not built; False: not before the next train(), eval(), merge or refresh; else (W + ΔW, sources, stamps)
    _merged_copy = None
    # a bank's frozen adapters in one piece: what its `_restack` made
    _stack = None
    # in which modes it ran with gradients since train() or a new step: "off", "by row", a rank; empty: None alone
    _ran = frozenset()

    def attach(self, r, lora_alpha, lora_dropout, dtype, device):
        if r:
            self.check_base(r)
        self.lora_dropout = nn.Dropout(lora_dropout).train(self.training) if lora_dropout > 0 else identity
        self.attach_factors(self.adapter_shapes(r), r, lora_alpha, dtype, device)

    def adapt(self, r, lora_alpha, lora_dropout, merge_weights):
        """The end of a constructor in loralib's manner: an adapter beside a frozen weight."""
        check_adapter(r, lora_alpha, lora_dropout)
        self.merge_weights = merge_weights
        self.attach(r, lora_alpha, lora_dropout, self.weight.dtype, self.weight.device)
        if self.r:
            self.weight.requires_grad = False
        # W is drawn a second time, as in loralib: the same seed gives the same layer
        self.reset_parameters()

    def check_base(self, r):
        """Raise ValueError for a base layer that cannot have an adapter of rank r, or of any (None)."""

    def check_merge(self, name):
        """Raise ValueError for a layer, of this name, whose W + ΔW is not one dense weight."""

    def places(self):
        """[(name below, layer, its W's name below, rows of it)] of the layers with an adapter that this consists of."""
        return [("", self, "weight", slice(None))]

    def biases(self):
        """{name: parameter} of what `bias="lora_only"` trains beside the adapter."""
        bias = getattr(self, "bias", None)
        return {} if bias is None else {"bias": bias}

    def narrow(self, lora_A, lora_B, start, stop):
        """The components start to stop of the r, as views."""
        return lora_A[start:stop], lora_B[:, start:stop]

    def init_adapter(self, lora_A, lora_B):
        """lora_A as nn.Linear's weight is initialised, lora_B zero."""
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        nn.init.zeros_(lora_B)

    def reset_lora_parameters(self):
        """Initialise lora_A and lora_B again, and the scale to lora_alpha / r."""
        self.init_adapter(self.lora_A, self.lora_B)
        self.set_scale(1.0)

    def reset_parameters(self):
        """Initialise everything again, as after `to_empty`."""
        getattr(super(), "reset_parameters", lambda: None)()
        if "lora_A" in self._parameters:
            self.reset_lora_parameters()
        self.refresh()

    def use_rank(self, rank, frozen=False):
        """Use the first `rank` of the r components from now on, at scale lora_alpha / rank; None: all of them."""
        known = rank is None or whole(rank) and 1 <= rank <= self.r
        check.value(known, "rank", repr(rank), f"an integer from 1 to {self.r}")
        self.rank, self.frozen = rank, frozen
        # a new tensor: a backward still to come has saved the other rank's
        self.scaling = self.scaling.clone()
        self.set_scale(self._factor)
        ranked_layers.add(self)
        self.refresh()

    def refresh(self):
        """Drop the copies; the next forward that wants one builds it from what the tensors hold then."""
        self._merged_copy = self._stack = None

    def train(self, mode=True):
        super().train(mode)
        # with merge_weights eval() merges, as in loralib; without, only train() acts: it ends what merge(model) began
        self.merged = not mode if self.merge_weights else self.merged and not mode
        self._ran = frozenset()
        self.refresh()
        return self

    def _apply(self, fn, *args, **kwargs):
        super()._apply(fn, *args, **kwargs)
        self.refresh()
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        names.adopt(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.refresh()

    def __getstate__(self):
        # without what is made anew, and what a bank notes for its own recompute
        return {key: value for key, value in vars(self).items() if key not in ("_merged_copy", "_chose", "_stack")}

    def __setstate__(self, state):
        super().__setstate__(state)
        if self.rank:
            ranked_layers.add(self)

    def dropout_p(self):
        # from the nn.Dropout that programs may change
        dropout = self.lora_dropout
        return dropout.p if dropout is not identity and dropout.training else 0.0

    def adapters(self):
        """(lora_A, lora_B, scaling, gates) in force: tuples of one tensor an adapter, gates (E,), (batch, E) or None.

        With ranks per batch row the gates are (batch, r), one for each rank row of the only adapter.
        """
        A, B, k = self.lora_A, self.lora_B, self.rank
        if id(self) in switch.row_ranks:
            # 1 for the components that a row uses, times what makes lora_alpha / r its lora_alpha / rank
            ranks = switch.row_ranks[id(self)].to(A.device).clamp(max=self.r)[:, None]
            gates = (torch.arange(self.r, device=A.device) < ranks) * ((k or self.r) / ranks)
            return (A,), (B,), self.scaling, gates
        if k is not None and self.frozen and self.training and k > 1:
            low, live = self.narrow(A.detach(), B.detach(), 0, k - 1), self.narrow(A, B, k - 1, k)
            return (low[0], live[0]), (low[1], live[1]), self.scaling, None
        if k is not None:
            A, B = self.narrow(A, B, 0, k)
        return (A,), (B,), self.scaling, None

    def forward(self, x):
        if self.merged or switch.apart or self._ran or self.rank or not self.r:
            weight = self.lone_weight()
            if weight is not None:
                return self.plain(x, weight)
        return self.adapted(x, *self.adapters())

    def run(self, adapters, x):
        return self.plain(x, self.base_weight()) if adapters is None else self.adapted(x, *adapters)

    def base_weight(self):
        """W as this library's formulas have it: (out, in) for a linear layer."""
        return self.weight.t() if self.fan_in_fan_out else self.weight

    @torch.no_grad()
    def merged_weight(self):
        """W + Σ gate · scale · ΔW, a new tensor in W's dtype, rounded once."""
        return (self.base_weight() + self.update(*self.adapters())).to(self.base_weight().dtype)

    def update(self, A, B, scaling, gates):
        """Σ gate · scale · ΔW of these adapters, in W's shape, in float32 or wider."""
        common = gates is None or gates.dim() == 1
        check.value(common, "model", "adapters for each batch row", "the same for all rows")
        scales = scaling.expand(len(A)) if gates is None else scaling * gates
        wide = torch.promote_types(torch.float32, A[0].dtype)
        return sum(self.delta(a.to(wide), b.to(wide) * s) for a, b, s in zip(A, B, scales.unbind(), strict=True))

    def lone_weight(self):
        """The weight that alone gives this call's y, or None where the adapter has to run."""
        if not self.r or is_off(self):
            return self.base_weight()
        if not self.merged or id(self) in switch.row_ranks:
            return None
        trained = [p for p in self._parameters.values() if p is not None and p.requires_grad]
        if trained and torch.is_grad_enabled():
            # an optimizer step may follow, and fused ones leave `_version` as it was
            self._merged_copy = False
        # a compiled graph cannot look at versions, so it could not tell a stale copy
        if self._merged_copy is False or self.training or torch.compiler.is_compiling():
            return None
        if trained and any([p.grad is not None for p in trained]):
            return None
        get, old = self._parameters.get, self._merged_copy
        sources = get("weight"), get("lora_A"), get("lora_B"), self.scaling
        if old and all(map(operator.is_, sources, old[1])) and old[2] == [(t._version, t.data_ptr()) for t in sources]:
            return old[0]
        if any(type(t) is not nn.Parameter for t in sources[:3]) or any(t.is_inference() for t in sources):
            return None
        # out of inference mode: a copy made there could not be saved for a backward later
        with torch.inference_mode(False):
            self._merged_copy = self.merged_weight(), sources, [(t._version, t.data_ptr()) for t in sources]
        return self._merged_copy[0]
