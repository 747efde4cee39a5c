"""LoRA on multi-head attention: an adapter on each of the projections q, k, v and o that is chosen."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastlora.nn import names
from fastlora.nn.fastpath import watch_registrations
from fastlora.nn.layer import check_adapter
from fastlora.nn.linear import LinearLoRA
from fastlora.ops import check

PROJECTIONS = ("q", "k", "v", "o")


class ProjectionLoRA(LinearLoRA, nn.Module):
    """The adapter of one projection, whose W (out_features, in_features) belongs to the attention layer."""

    kind = "projection"

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def run(self, adapters, x, weight, bias):
        return F.linear(x, weight, bias) if adapters is None else self.project(x, weight, bias, *adapters)


class AttentionLoRA:
    """`nn.MultiheadAttention` with children lora_q, lora_k, lora_v, lora_o where there is an adapter."""

    kind = "attention"
    holds_adapters = True

    def add_projections(self, enable_lora, cls=ProjectionLoRA):
        """Add children lora_q, …, without adapters yet."""
        for name in enable_lora:
            out_features, in_features = self.projection_weights()[name].shape
            self.add_module(f"lora_{name}", cls(in_features, out_features).train(self.training))

    def reset_lora_parameters(self):
        for projection in self.projections().values():
            projection.reset_lora_parameters()

    def projections(self):
        """{"q": ProjectionLoRA, …} of those that have an adapter."""
        return {name: self._modules[f"lora_{name}"] for name in PROJECTIONS if f"lora_{name}" in self._modules}

    def projection_weights(self):
        """{"q": W_q (embed_dim, its input's size), …, "o": …}, as views."""
        joint = self._qkv_same_embed_dim
        qkv = self.in_proj_weight.chunk(3) if joint else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return dict(zip(PROJECTIONS, (*qkv, self.out_proj.weight), strict=True))

    def biases(self):
        owners = {"out_proj.bias" if name == "o" else "in_proj_bias" for name in self.projections()}
        return {name: p for name, p in self.named_parameters() if name in owners}

    def check_merge(self, name):
        """Raise ValueError where a weight is no parameter (pruned, say), so that no W + ΔW can take its place."""
        held = dict(self.named_parameters(remove_duplicate=False))
        dense = all(weight in held for _, _, weight, _ in self.places())
        check.value(dense, name, f"a {type(self).__name__}, which has no dense weight", "a layer to merge into")

    def places(self):
        for name, projection in self.projections().items():
            weight, rows = f"{name}_proj_weight", slice(None)
            if name == "o":
                weight = "out_proj.weight"
            elif self._qkv_same_embed_dim:
                start = PROJECTIONS.index(name) * self.embed_dim
                weight, rows = "in_proj_weight", slice(start, start + self.embed_dim)
            yield f"lora_{name}", projection, weight, rows

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        names.adopt(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
                average_attn_weights=True, is_causal=False):  # fmt: skip
        check.value(attn_mask is not None or not is_causal, "attn_mask", None, "a mask, of which is_causal is a hint")
        check.value(not query.is_nested, "query", "a nested tensor", "a padded one and key_padding_mask; "
                    "nn.TransformerEncoder makes none with enable_nested_tensor=False")  # fmt: skip
        check.value(query.dim() in (2, 3), "query", f"shape {tuple(query.shape)}", "2 or 3 dimensions")
        batched, batch = query.dim() == 3, 0 if self.batch_first else 1
        fits = key.dim() == value.dim() == query.dim() and key.shape[:-1] == value.shape[:-1]
        fits = fits and (not batched or key.shape[batch] == query.shape[batch])
        got = f"shapes {tuple(key.shape)} and {tuple(value.shape)}"
        check.value(fits, "key, value", got, f"one length, and query's batch: {tuple(query.shape)}")
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._project(query, key, value)
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        k, v, mask = self._extend(k, v, mask)
        y, shares = self._attend(q, k, v, mask, need_weights, average_attn_weights)
        # batch first: an adapter may have a gate for each batch row
        y = self._adapt("o", y.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return y.squeeze(0), None if shares is None else shares.squeeze(0)
        # dense in the order of the result, as torch's: programs view it
        return y if self.batch_first else y.transpose(0, 1).contiguous(), shares

    def _adapt(self, name, x, weight, bias):
        projection = self._modules.get(f"lora_{name}")
        return F.linear(x, weight, bias) if projection is None else projection(x, weight, bias)

    def _project(self, query, key, value):
        """q, k, v as (batch, heads, length, head_dim)."""
        weights = self.projection_weights()
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = zip("qkv", (query, key, value), biases, strict=True)
        each = [self._adapt(name, x, weights[name], bias) for name, x, bias in inputs]
        return [t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in each]

    def _mask(self, q, k, key_padding_mask, attn_mask):
        """One additive mask that broadcasts to (batch, heads, query length, key length), or None."""
        n, heads, length, _ = q.shape
        mask = None
        if attn_mask is not None:
            shapes = (length, k.shape[2]), (n * heads, length, k.shape[2])
            check.value(attn_mask.shape in shapes, "attn_mask", tuple(attn_mask.shape), f"{shapes[0]} or {shapes[1]}")
            mask = _additive("attn_mask", attn_mask, q.dtype)
            mask = mask.unflatten(0, (n, heads)) if mask.dim() == 3 else mask[None, None]
        if key_padding_mask is not None:
            got, want = tuple(key_padding_mask.shape), (n, k.shape[2])
            check.value(got == want, "key_padding_mask", got, want)
            padding = _additive("key_padding_mask", key_padding_mask, q.dtype)[:, None, None]
            mask = padding if mask is None else mask + padding
        return mask

    def _extend(self, k, v, mask):
        """With add_bias_kv and add_zero_attn: one more key and value each, that no mask hides."""
        n, heads, length, size = k.shape
        if self.bias_k is not None:
            bias_k, bias_v = (t.view(1, heads, 1, size).expand(n, -1, -1, -1) for t in (self.bias_k, self.bias_v))
            k, v = torch.cat((k, bias_k), 2), torch.cat((v, bias_v), 2)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        more = k.shape[2] - length
        return k, v, F.pad(mask, (0, more)) if more and mask is not None else mask

    def _attend(self, q, k, v, mask, need_weights, average):
        p = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, p), None
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        shares = F.dropout((scores if mask is None else scores + mask).softmax(-1), p)
        return shares @ v, shares.mean(1) if average else shares


def _additive(name, mask, dtype):
    known = mask.dtype == torch.bool or mask.is_floating_point()
    check.kind(known, name, mask.dtype, "bool, True where hidden, or floats")
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)


class MultiheadAttention(AttentionLoRA, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with an adapter on each projection named in `enable_lora`, and on no other.

    Each of "q", "k", "v", "o" in `enable_lora` computes x Wᵀ + bias + lora_alpha / r (dropout(x) lora_Aᵀ) lora_Bᵀ with
    its own lora_A (r, its input's size) and lora_B (embed_dim, r), under torch's keys and lora_q.lora_A and so on.
    `kwargs` are torch's (kdim, vdim, batch_first, dropout, bias, …), and forward's arguments and results are torch's.
    The projections run unmerged in eval mode; `merge_and_export` gives a plain nn.MultiheadAttention. r = 0 has no
    adapters. Raises ValueError naming the argument. Source: loratorch, whose delta is not confined to what is enabled.
    """

    lora_base = nn.MultiheadAttention

    def __init__(self, embed_dim, num_heads, enable_lora=PROJECTIONS, r=0, lora_alpha=1, lora_dropout=0.0, **kwargs):
        check_adapter(r, lora_alpha, lora_dropout)
        enabled = isinstance(enable_lora, (list, tuple)) and all(name in PROJECTIONS for name in enable_lora)
        check.value(enabled, "enable_lora", repr(enable_lora), "a list of 'q', 'k', 'v', 'o'")
        watch_registrations()
        super().__init__(embed_dim, num_heads, **kwargs)
        if r:
            self.add_projections(enable_lora)
            weight = self.out_proj.weight
            for _, projection, name, _ in self.places():
                projection.attach(r, lora_alpha, lora_dropout, weight.dtype, weight.device)
                self.get_parameter(name).requires_grad = False
            self.reset_lora_parameters()
