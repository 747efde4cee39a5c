"""A layer with several adapters, by name: which of them run is chosen per thread, in one gated call."""

import inspect
import itertools
import operator
from urllib.parse import unquote

import torch
from torch import nn

from fastlora.nn.attention import ProjectionLoRA
from fastlora.nn.convert import check_convertible, convert
from fastlora.nn.layer import Adapter, LoRALayer
from fastlora.nn.linear import DenseLoRA
from fastlora.nn.switch import Stacked, cannot_know, checkpoint_context, is_off, is_recompute, selection, switch
from fastlora.ops import check

_TAKEN = frozenset(dir(nn.ModuleDict()))


def escape(name):
    """A task's name as a key of nn.ModuleDict, which refuses dots and the names of its own attributes, as "train"."""
    key = name.replace("%", "%25").replace(".", "%2E")
    return f"%{ord(key[0]):02X}{key[1:]}" if key in _TAKEN else key


def pick(tasks, keys):
    """The modules of these keys. Raises KeyError, for one removed since it was chosen, that lists those there are."""
    held = tasks._modules
    try:
        return [held[key] for key in keys]
    except KeyError as error:
        name, *others = map(unquote, (error.args[0], *held))
    raise KeyError(f"fastlora: task: got {name!r}, expected one of {others}")


class TaskAdapter(Adapter, nn.Module):
    """One task's lora_A, lora_B and scaling on one layer."""


class Owner:
    """The key under which a thread's choice of adapters is kept; a copy of a model has its own."""


class Chooser:
    """A layer whose tasks are chosen by `switch`."""

    # (names, gates) of the forwards since train() that a recompute could repeat; None: none yet, False: several
    _chose = None

    def _note_run(self):
        """A recompute that nothing carried the tasks to must be the only selection there was, or it could differ."""
        # in eval mode without gradients no backward will follow
        if torch.compiler.is_compiling() or not self.training and not torch.is_grad_enabled():
            return
        keys, gates = selection(self.owner)
        ran = self._chose
        same = ran and ran[0] == keys and ran[1] is gates
        if is_recompute():
            if not same:
                cannot_know("tasks were chosen")
        elif not same and not switch.restored:
            self._chose = (keys, gates) if ran is None else False

    def train(self, mode=True):
        self._chose, self._ran = None, frozenset()
        return super().train(mode)

    __getstate__ = LoRALayer.__getstate__


class Bank(Chooser):
    """Mixed in before a kind of LoRA layer: `tasks` holds a TaskAdapter for each name, `owner` keys the selection.

    y = base(x) + Σ gate_e · scale_e · (D(x) A_eᵀ) B_eᵀ over the tasks that `switch` has selected for the owner.
    """

    # in a mixture, whose layers may have gates of their own: the number of this layer
    place = None

    def chosen(self):
        """(keys, gates) in force here; a mixture's bank takes its own of the gates, of the adapters that it has."""
        keys, gates = selection(self.owner)
        if self.place is None:
            return keys, gates
        if isinstance(gates, tuple):
            gates = gates[self.place]
        tasks = self._modules["tasks"]._modules
        if len(tasks) < len(keys):
            held = [e for e, key in enumerate(keys) if key in tasks]
            keys, gates = tuple(keys[e] for e in held), None if gates is None else gates[..., held]
        return keys, gates

    @property
    def r(self):
        return sum(task.r for task in pick(self.tasks, self.chosen()[0]))

    def set_scale(self, scale):
        for task in pick(self.tasks, self.chosen()[0]):
            task.set_scale(scale)

    def adapters(self):
        keys, gates = self.chosen()
        tasks = pick(self.tasks, keys)
        scaling = tasks[0].scaling if len(tasks) == 1 else torch.stack([t.scaling for t in tasks])
        # nn.Module's own attribute look-up costs ten times a dict's, for each of many tasks
        factors = [t._parameters for t in tasks]
        try:
            A, B = tuple(f["lora_A"] for f in factors), tuple(f["lora_B"] for f in factors)
        except KeyError:
            # pruning, FSDP1 and DataParallel keep plain attributes
            A, B = tuple(t.lora_A for t in tasks), tuple(t.lora_B for t in tasks)
        # a model may lie on several devices
        return A, B, scaling, gates if gates is None else gates.to(A[0].device)

    def in_force(self, keys, gates):
        """`adapters()`, several frozen ones in one piece: at one token a list of them costs more than it computes."""
        if torch.compiler.is_compiling():
            return self.adapters()
        stack = self._stack
        if stack is None or not stack[0](keys):
            stack = self._stack = self._restack(keys)
        if stack is None:
            return self.adapters()
        return *stack[1:], gates if gates is None else gates.to(stack[2][0].device)

    def _restack(self, keys):
        """(whether it holds yet, lora_A, lora_B, scaling) of a copy of frozen adapters in one piece; None for none."""
        # only these call `lora_linear`, whose A and B may hold several adapters
        if len(keys) < 2 or not isinstance(self, (DenseLoRA, ProjectionLoRA)):
            return None
        tasks = pick(self.tasks, keys)
        holders, scales = [task._parameters for task in tasks], [task.scaling for task in tasks]
        tensors = [t for holder in holders for t in holder.values()]
        if any(t.requires_grad or t.is_inference() for t in (*tensors, *scales)):
            return None
        versions, places = [t._version for t in (*tensors, *scales)], [*map(torch.Tensor.data_ptr, tensors)]

        def holds(now):
            # few looks: each object is one that the product before has driven out of the caches
            held = itertools.chain.from_iterable(map(dict.values, holders))
            same = now == keys and all(map(operator.is_, held, tensors))
            same = same and versions == [t._version for t in (*tensors, *scales)]
            same = same and places == [*map(torch.Tensor.data_ptr, tensors)]
            return same and not (torch.is_grad_enabled() and any([t.requires_grad for t in tensors]))

        # out of inference mode, as a merged copy
        with torch.inference_mode(False), torch.no_grad():
            A, B = torch.cat([t.lora_A for t in tasks]), torch.cat([t.lora_B for t in tasks], 1)
            half = self.weight.dtype if isinstance(self, DenseLoRA) else None
            if A.dtype == torch.float32 and half in (torch.bfloat16, torch.float16):
                A, B = A.to(half), B.to(half)
            stacked = Stacked((A,))
            stacked.ranks = [t.r for t in tasks]
            return holds, stacked, (B,), torch.stack(scales)

    def forward(self, *args, **kwargs):
        self._note_run()
        chosen = self.chosen()
        none = is_off(self) or not chosen[0]
        return self.run(None if none else self.in_force(*chosen), *args, **kwargs)


def open_banks(model, names, owner, lora_dropout, bank=Bank):
    """Make these layers of a plain model, in place, banks without adapters; returns {name: bank}, in the model's order.

    `bank` is the mixin. Raises ValueError, before anything changes, for a layer that cannot have adapters.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        check_convertible(name, modules, None)
    for name in names:
        convert(modules[name], bank)
    banks = {name: module for name, module in model.named_modules() if isinstance(module, Bank)}
    for layer in banks.values():
        layer.owner, layer.tasks = owner, nn.ModuleDict()
        layer.lora_dropout = nn.Dropout(lora_dropout).train(layer.training)
    return banks


class Around(nn.Module):
    """Holds a module, and has its attributes: what a user or a Trainer asks for, as config, device, generate."""

    _held = "model"

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == self._held:
                raise
            return getattr(getattr(self, self._held), name)


class Wrapper(Around):
    """Answers in place of `model`, which it holds, what a Trainer asks of it."""

    @property
    def accepts_loss_kwargs(self):
        """What a Trainer asks before it passes num_items_in_batch: whether the wrapped model takes any keyword."""
        kinds = [parameter.kind for parameter in inspect.signature(self.model.forward).parameters.values()]
        return getattr(self.model, "accepts_loss_kwargs", inspect.Parameter.VAR_KEYWORD in kinds)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **options):
        """transformers' method, with `context_fn=fastlora.checkpoint_context`: a recompute runs the same adapters."""
        given = {"use_reentrant": False, "context_fn": checkpoint_context, **(gradient_checkpointing_kwargs or {})}
        check.value(not given["use_reentrant"], "use_reentrant", given["use_reentrant"],
                    "False: a reentrant recompute cannot know the adapters")  # fmt: skip
        name = "activation" if hasattr(self.model, "activation_checkpointing_enable") else "gradient"
        enable = getattr(self.model, f"{name}_checkpointing_enable")
        enable(**{f"{name}_checkpointing_kwargs": given}, **options)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **options):
        """The same, by its name from transformers 5.24 on."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)


class Wrapped(Chooser, Around):
    """A module of a user's own type, `module`, with a module for each task that runs in its place.

    Several tasks, or weights: module(x) + Σ gate · (task(x) − module(x)), a loop, as nothing is known of what they do.
    """

    holds_adapters = True
    _held = "module"
    # as LoRALayer's, for `is_off`
    rank = None
    _ran = frozenset()

    def __init__(self, module, owner):
        super().__init__()
        self.module, self.owner, self.tasks = module, owner, nn.ModuleDict()

    def check_merge(self, name):
        check.value(False, name, "a module of a user's type with tasks", "a layer to merge into")

    def biases(self):
        return {}

    def forward(self, *args, **kwargs):
        self._note_run()
        keys, gates = selection(self.owner)
        if is_off(self) or not keys:
            return self.module(*args, **kwargs)
        tasks = pick(self.tasks, keys)
        if len(tasks) == 1 and gates is None:
            return tasks[0](*args, **kwargs)
        y = base = self.module(*args, **kwargs)
        gates = base.new_ones(len(tasks)) if gates is None else gates.to(base.device)
        for gate, task in zip(gates.unbind(-1), tasks, strict=True):
            gate = gate.view(-1, *(1 for _ in base.shape[1:])) if gate.dim() else gate
            y = y + gate * (task(*args, **kwargs) - base)
        return y
