"""The one table of names: what other libraries call a layer's tensors, and how their factors become ours.

here           fc.lora_A (r, in)   fc.lora_B (out, r)   emb.lora_A (r, V)   emb.lora_B (D, r)   attn.lora_q.lora_A
loralib        the same; a convolution's base is conv.conv.weight, at git HEAD a second time conv.weight
loratorch      fc.w_lora_A (r, in)   fc.w_lora_B (out, r)   emb.w_lora_A (r, D)   emb.w_lora_B (V, r)
               attn.qv_lora_A (r, E)   attn.qv_lora_B (3E, r)   attn.o_lora_A; q_, k_, v_ where their sizes differ
TheDiscoMole   fc.<task>.module.A (out, r)   fc.<task>.module.B (r, in)   emb: A (V, r), B (r, D)   fc.module.weight
PEFT, a file   base_model.model.fc.lora_A.weight   fc.base_layer.weight   emb.lora_embedding_A (r, V)
               attn.lora_A.weight (r, E)   attn.lora_B.weight (3E, r)   attn.base_layer.out_proj.lora_A.weight
PEFT, memory   base_model.model.fc.lora_A.default.weight   emb.lora_embedding_A.default

PEFT adds out_proj's update twice, in training too (huggingface/peft#3774, open at 0.21.2): lora_B is twice that here.

No file but PEFT's holds lora_alpha: it has to be the same on both sides. TheDiscoMole's scale is 1.
"""

import re

import torch
import torch.nn.functional as F

from fastlora.ops import check

PEFT_OUT = 2
# the form of convolution that a dialect can hold
_FORMS = {"loralib": "loralib", "loratorch": "loralib", "tasks": "tasks", "peft": "peft"}
# what dialects call A and B of `to_tasks`
_TURNED = {"tasks": ("default.module.A", "default.module.B"), "loratorch": ("w_lora_B", "w_lora_A")}


def from_any_name(key):
    """The name here of a tensor that loralib, PEFT's files or a PEFT model call `key`."""
    key = re.sub(r"(^|\.)base_layer\.", r"\1", key.removeprefix("base_model.model."))
    key = re.sub(r"((?:^|\.)lora_)embedding_([AB])(\.[^.]+)?$", r"\1\2", key)
    return re.sub(r"((?:^|\.)lora_[AB])(\.[^.]+)?\.weight$", r"\1", key)


def to_tasks(kind, A, B):
    """TheDiscoMole/LoRA's A (out, r) and B (r, in), letters swapped, of lora_A, lora_B, or back: views or None."""
    return tuple(t if t is None else t.mT for t in (A, B)) if kind == "embedding" else (B, A)


def adopt(layer, state_dict, prefix):
    """Rename, in place, what `state_dict` holds below `prefix` under another library's names to this layer's."""
    entries = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    parts = layer._parameters, layer._buffers
    if all(any(name in part for part in parts) or name.partition(".")[0] in layer._modules for name in entries):
        return
    ours = read(layer, entries, where=prefix)
    for name in entries:
        del state_dict[prefix + name]
    state_dict.update((prefix + name, tensor) for name, tensor in ours.items())


def read(layer, entries, kind=None, where=""):
    """`entries`, {name below the layer: tensor} under any library's names, under ours; unknown names stay.

    A plain module is read as the LoRA layer of `kind` that it would become. Joint adapters of q, k, v are split: lora_A
    for each, lora_B's rows. ValueError: two values for a tensor, several tasks, a change of q, k or v not adapted here.
    """
    kind, found = kind or layer.kind, {}
    for name, tensor in entries.items():
        plain = from_any_name(name)
        plain = re.sub(r"^(module|conv)\.(?=\w+$)" if kind == "conv" else r"^module\.(?=\w+$)", "", plain)
        put(found, plain, tensor, where)
    if hasattr(layer, "tasks"):
        return found
    if kind == "attention":
        return _read_attention(layer, found, where)
    tasks = {match[1] for name in found if (match := re.fullmatch(r"(.+)\.module\.[AB]", name))}
    check.value(len(tasks) < 2, f"{where}*.module.A", f"the tasks {sorted(tasks)}", "a single one")
    # loratorch's lora_B lora_A is W's update as TheDiscoMole's A B is
    for A, B in [(f"{task}.module.A", f"{task}.module.B") for task in tasks] + [_TURNED["loratorch"]]:
        pair = to_tasks(kind, found.pop(A, None), found.pop(B, None))
        for name, tensor in zip(("lora_A", "lora_B"), pair, strict=True):
            if tensor is not None:
                put(found, name, tensor.contiguous(), where)
    if kind == "merged" and {"lora_A", "lora_B"} <= found.keys():
        found["lora_B"] = _packed(layer, found["lora_A"], found["lora_B"], where)
    return found


def put(found, name, tensor, where=""):
    """found[name] = tensor; ValueError if another value is there."""
    other = found.get(name, tensor)
    same = other is tensor or other.dtype == tensor.dtype and torch.equal(other, tensor)
    check.value(same, where + name, "two names with different values", "one value")
    found[name] = tensor


def _packed(layer, lora_A, lora_B, where):
    """MergedLinear's lora_B of one in block form; any other is returned as it is."""
    groups, size = sum(layer.enable_lora), layer.out_features // len(layer.enable_lora)
    if lora_B.shape != (layer.out_features, lora_A.shape[0]) or len(lora_A) != layer.r * groups:
        return lora_B
    rows = [part for part, on in zip(lora_B.split(size), layer.enable_lora, strict=True) if on]
    packed = torch.cat([part[:, i * layer.r : (i + 1) * layer.r] for i, part in enumerate(rows)])
    inside = torch.equal(layer.block_form(packed), lora_B)
    check.value(inside, where + "lora_B", "an update across parts of a MergedLinear", "one within each enabled part")
    return packed


def _read_attention(layer, found, where):
    plain = not hasattr(layer, "projections")
    own = {} if plain else layer.projections()
    if any(hasattr(projection, "tasks") for projection in own.values()):
        return found
    enabled, r = ("qkvo", None) if plain else ("".join(own), next((p.r for p in own.values()), 0))
    pairs, joint = {}, None
    known = [name for name in found if re.fullmatch(r"(q?k?v?_|o_|out_proj\.|)lora_A", name)]
    for name in [name for name in known if name[:-1] + "B" in found]:
        letters, A, B = re.sub(r"_?lora_A$", "", name), found.pop(name), found.pop(name[:-1] + "B")
        if letters in ("o", "out_proj."):
            pairs["o"] = A, B if letters == "o" else B * PEFT_OUT
        elif len(letters) == 1 and len(B) != 3 * layer.embed_dim:
            pairs[letters] = A, B
        else:
            joint = A, B
    if joint:
        pairs.update(split_joint(*joint, r, enabled, pairs.get("o"), where))
    for letter, (A, B) in pairs.items():
        rank = r if r is not None else len(pairs["q"][0]) if "q" in pairs else len(A)
        if letter in enabled or A.any() and B.any():
            A, B = (A[:rank], B[:, :rank]) if _fits(A, B, rank) else (A, B)
            # clones: load_state_dict(assign=True) keeps what it is given, and q, k, v are no longer tied here
            put(found, f"lora_{letter}.lora_A", A.clone(memory_format=torch.contiguous_format), where)
            put(found, f"lora_{letter}.lora_B", B.clone(memory_format=torch.contiguous_format), where)
    return found


def _fits(A, B, r):
    """Whether what is beyond the first r components adds nothing."""
    return not (A[r:].any() and B[:, r:].any())


def split_joint(A, B, r=None, enabled="qkv", out=None, where=""):
    """{"q": (lora_A, lora_B), …} of one adapter of q, k and v: B's rows, and A for each.

    Where A is `join`'s stack, B its blocks: those, of rank r (None: what is found), if `out`, out_proj's, allows it.
    """
    rows = dict(zip("qkv", B.chunk(3), strict=True))
    names = [n for n in rows if n in enabled]
    for name in [n for n in rows if n not in names]:
        changes = A.any() and rows[name].any() and (rows[name].float() @ A.float()).any()
        check.value(not changes, f"{where}lora_B", f"an adapter of q, k, v that changes {name}",
                    f"{name!r} in enable_lora, here {names}; loratorch does not confine its adapter to what is "
                    "enabled")  # fmt: skip
    live = names if r is not None else [n for n in names if rows[n].any()]
    rank = r or len(A) // max(len(live), 1)
    parts = {n: slice(i * rank, (i + 1) * rank) for i, n in enumerate(live)}
    stacked = len(live) > 1 and len(A) == rank * len(live) and (out is None or _fits(*out, rank))
    if stacked and all(rows[n].count_nonzero() == rows[n][:, parts[n]].count_nonzero() for n in live):
        return {n: (A[parts.get(n, slice(rank))], rows[n][:, parts.get(n, slice(rank))]) for n in names}
    return {n: (A, rows[n]) for n in names}


def join(projections):
    """A (R, E) and B (3E, R) of one adapter for q, k and v, from {"q": (lora_A, lora_B), …} of those that have one.

    If all lora_A are equal, R = r. Else the lora_A are stacked, R = g·r for g projections, and B has a block for each;
    the same update then needs lora_alpha scaled by g, as it is divided by R.
    """
    (A, B), *more = projections.values()
    one = all(torch.equal(A, other) for other, _ in more)
    blank = None, torch.zeros_like(B) if one else B.new_empty(len(B), 0)
    rows = [projections.get(n, blank)[1] for n in "qkv"]
    return (A, torch.cat(rows)) if one else (torch.cat([a for a, _ in projections.values()]), torch.block_diag(*rows))


@torch.no_grad()
def write(layer, dialect, where=""):
    """{name below the layer: tensor} of the layer's adapter under another library's names, detached.

    Raises ValueError, naming the layer, for an adapter that the library cannot hold. The layer has one of its own.
    """
    if layer.kind == "attention":
        return _write_attention(layer, dialect, where)
    form = getattr(layer, "form", None)
    wanted = _FORMS.get(dialect, form) if layer.kind == "conv" else form
    check.value(form == wanted, where, f"a convolution in the form {form!r}", f"{wanted!r}, the one that {dialect} has")
    lora_A, lora_B = layer.lora_A.detach(), layer.lora_B.detach()
    if layer.kind == "merged" and dialect in ("tasks", "peft"):
        lora_B = layer.block_form(lora_B)
    A, B = (t.contiguous() for t in to_tasks(layer.kind, lora_A, lora_B))
    got = f"lora_alpha = {layer.lora_alpha} at r = {layer.r}"
    one = dialect != "tasks" or layer.lora_alpha == layer.r
    check.value(one, where, got, "lora_alpha = r: TheDiscoMole's adapters have the scale 1")
    if dialect in _TURNED:
        return dict(zip(_TURNED[dialect], (A, B), strict=True))
    named = ("lora_embedding_{}" if layer.kind == "embedding" else "lora_{}.weight") if dialect == "peft" else "lora_{}"
    return {named.format("A"): lora_A, named.format("B"): lora_B}


def _write_attention(layer, dialect, where):
    each = layer.projections()
    if dialect in ("fastlora", "tasks"):
        found = ((f"lora_{name}", write(p, dialect, f"{where}.lora_{name}")) for name, p in each.items())
        return {f"{start}.{key}": tensor for start, tensors in found for key, tensor in tensors.items()}
    check.value(dialect != "loralib", where, "an attention layer", "a layer that loralib has")
    joint = layer._qkv_same_embed_dim
    check.value(joint or dialect != "peft", where, "kdim or vdim", "an attention layer that PEFT has: equal sizes")
    pairs = {name: (p.lora_A.detach(), p.lora_B.detach()) for name, p in each.items()}
    out = pairs.pop("o", None)
    found = {f"{name}_": pair for name, pair in pairs.items()}
    if joint and (pairs or dialect == "peft"):
        alike = len({(p.r, p.lora_alpha) for p in each.values()}) == 1
        check.value(alike, where, "projections of several ranks or lora_alpha", "one for all in a joint adapter")
        blank = out and (torch.zeros_like(out[0]), torch.zeros_like(out[1]))
        A, B = join(pairs or {"q": blank})
        found = {f"{''.join(pairs)}_": (A, B)}
    if dialect == "peft":
        # there it always has one, of the same rank
        out_A, out_B = out or (A[:0], B[: layer.embed_dim, :0])
        more = len(A) - len(out_A)
        out = F.pad(out_A, (0, 0, 0, more)), F.pad(out_B / PEFT_OUT, (0, more))
        found = {"": (A, B), "base_layer.out_proj.": out}
    elif out:
        found["o_"] = out
    ends = {x: f"lora_{x}.weight" if dialect == "peft" else f"lora_{x}" for x in "AB"}
    return {head + ends[x]: t.contiguous() for head, pair in found.items() for x, t in zip(ends, pair, strict=True)}


def base_name(layer, dialect, name):
    """What another library calls a tensor of the base layer."""
    if dialect == "peft":
        return ".".join(f"base_layer.{part}" for part in name.split("."))
    if dialect == "tasks" and layer.kind != "attention":
        return f"module.{name}"
    return f"conv.{name}" if dialect == "loralib" and layer.kind == "conv" else name
