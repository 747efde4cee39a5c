"""A layer with several adapters, by name: which of them run is chosen per thread, in one gated call."""

import torch
from torch import nn

from fastlora.nn.attention import ProjectionLoRA
from fastlora.nn.layer import Adapter
from fastlora.nn.switch import cannot_know, is_recompute, selection, switch


def escape(name):
    """A task's name as a key of nn.ModuleDict, which refuses dots."""
    return name.replace("%", "%25").replace(".", "%2E")


def unescape(key):
    return key.replace("%2E", ".").replace("%25", "%")


class TaskAdapter(Adapter, nn.Module):
    """One task's lora_A, lora_B and scaling on one layer."""

    def extra_repr(self):
        return f"r={self.r}, lora_alpha={self.lora_alpha}"


class Bank:
    """Mixed in before a kind of LoRA layer: `tasks` holds a TaskAdapter for each name, `owner` keys the selection.

    y = base(x) + Σ gate_e · scale_e · (D(x) A_eᵀ) B_eᵀ over the tasks that `switch` has selected for the owner.
    """

    # (names, gates) of the forwards since train() that a recompute could repeat; None: none yet, False: several
    _chose = None

    def open(self, owner, lora_dropout=0.0):
        """Make room for tasks."""
        self.owner, self.tasks = owner, nn.ModuleDict()
        self.lora_dropout = nn.Dropout(lora_dropout).train(self.training)
        if self.kind == "conv":
            self.form = "tasks"

    @property
    def r(self):
        """The rank in force: the sum of the selected tasks'."""
        return sum(self.tasks[key].r for key in selection(self.owner)[0])

    def set_scale(self, scale):
        """Scale the selected tasks by scale · lora_alpha / r."""
        for key in selection(self.owner)[0]:
            self.tasks[key].set_scale(scale)

    def adapters(self):
        keys, gates = selection(self.owner)
        held = self.tasks._modules
        tasks = [held[key] for key in keys]
        scaling = tasks[0].scaling if len(tasks) == 1 else torch.stack([t.scaling for t in tasks])
        # nn.Module's own attribute look-up costs ten times a dict's, for each of many tasks
        factors = [t._parameters for t in tasks]
        return tuple(f["lora_A"] for f in factors), tuple(f["lora_B"] for f in factors), scaling, gates

    def forward(self, *args, **kwargs):
        if not torch.compiler.is_compiling():
            self._note_run()
        none = self.is_off() or not selection(self.owner)[0]
        return self.run(None if none else self.adapters(), *args, **kwargs)

    def _note_run(self):
        """A recompute that nothing carried the tasks to must be the only selection there was, or it could differ."""
        keys, gates = selection(self.owner)
        ran = self._chose
        same = ran and ran[0] == keys and ran[1] is gates
        if is_recompute():
            if not same:
                cannot_know("tasks were chosen")
        elif not same and not switch.restored and (self.training or torch.is_grad_enabled()):
            self._chose = (keys, gates) if ran is None else False

    def train(self, mode=True):
        self._chose = None
        return super().train(mode)

    def __getstate__(self):
        return {**super().__getstate__(), "_chose": None}


class TaskProjection(Bank, ProjectionLoRA):
    """A projection of an attention layer with named tasks."""


class Wrapped(nn.Module):
    """A module of a user's own type, `module`, with a module for each task that runs in its place.

    Several tasks, or weights: module(x) + Σ gate · (task(x) − module(x)), a loop, as nothing is known of what they do.
    """

    def __init__(self, module, owner):
        super().__init__()
        self.module, self.owner, self.tasks = module, owner, nn.ModuleDict()

    def forward(self, *args, **kwargs):
        keys, gates = selection(self.owner)
        if not keys:
            return self.module(*args, **kwargs)
        if len(keys) == 1 and gates is None:
            return self.tasks[keys[0]](*args, **kwargs)
        base = self.module(*args, **kwargs)
        y = base
        for e, key in enumerate(keys):
            update = self.tasks[key](*args, **kwargs) - base
            gate = 1 if gates is None else gates[..., e]
            if gates is not None and gates.dim() > 1:
                gate = gate.view(-1, *(1 for _ in base.shape[1:]))
            y = y + gate * update
        return y
