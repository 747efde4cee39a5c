"""The model with named tasks."""

import collections
import copy

import torch
from torch import nn

from fastlora.model import check_merge, find_targets, make_plain
from fastlora.nn.bank import Bank, Owner, TaskAdapter, Wrapped, Wrapper, escape, open_banks
from fastlora.nn.fastpath import update_fast_paths
from fastlora.nn.layer import LoRALayer, check_adapter
from fastlora.nn.switch import selected, selection
from fastlora.ops import check
from fastlora.tasks import state
from fastlora.tasks.adapters import becomes_bank, custom_constructor, default_rank, find, make_adapter


class Model(Wrapper):
    """A model with named tasks: `model(x, task="a")`, `model(x, tasks={"a": 0.7, "b": 0.3})`, `with model.task("a"):`.

    Every linear layer, embedding, convolution and nn.MultiheadAttention of `model`, or those that `target_modules`
    names as in `inject`, gets room for tasks, in place; modules of a type in `base_module_wrappers` get what is
    registered there. A layer's y = base(x) + Σ gate_e · scale_e · (D(x) A_eᵀ) B_eᵀ is one op call. A choice of tasks is
    a name; a list of names, which are summed; a dict of weights; or a list with one of these, or None, for each batch
    row, the first dimension of every layer's input. Nothing chosen is the base model. A choice is a thread's. A weight
    may be a tensor: it gets a gradient, and compiled code is not compiled again for its value, as it is for other
    names: torch._dynamo.config.recompile_limit allows eight choices. `r` and `lora_alpha` are the tasks' defaults:
    int(sqrt(min(in, out))), and r. Raises ValueError for a layer that cannot have tasks. Source: TheDiscoMole/LoRA.
    """

    def __init__(self, model, r=None, lora_alpha=None, lora_dropout=0.0, target_modules=None):
        super().__init__()
        check.kind(isinstance(model, nn.Module), "model", type(model).__name__, "an nn.Module")
        held = [m for m in model.modules() if isinstance(m, (LoRALayer, Wrapped, Model))]
        check.value(not held, "model", "a model that has adapters", "a plain one")
        check_adapter(1 if r is None else r, 1 if lora_alpha is None else lora_alpha, lora_dropout, least=1)
        self.defaults, self.owner, self.names = (r, lora_alpha), Owner(), []
        modules = dict(model.named_modules(remove_duplicate=False))
        found = find("", model, set()) if target_modules is None else find_targets(model, target_modules)
        found = {name: becomes_bank(modules[name]) for name in found}
        check.value(found, "model", f"a {type(model).__name__}", "a model with layers that can have adapters")
        banks = open_banks(model, [name for name, bank in found.items() if bank], self.owner, lora_dropout)
        for layer in banks.values():
            if layer.kind == "conv":
                layer.form = "tasks"
        self.model = model
        wrapped = {id(modules[name]): Wrapped(modules[name], self.owner) for name, bank in found.items() if not bank}
        # under each of a module's names: ties stay
        for name, module in [*self.named_modules(remove_duplicate=False)]:
            if id(module) in wrapped:
                self.set_submodule(name, wrapped[id(module)])
        update_fast_paths(self.model)

    def lora_layers(self):
        """The layers that hold tasks."""
        return (layer for _, layer in self._layers())

    def _layers(self, every_name=False):
        found = self.model.named_modules(remove_duplicate=not every_name)
        return [(name, module) for name, module in found if isinstance(module, (Bank, Wrapped))]

    def add_task(self, task, r=None, lora_alpha=None, init="zero", exist_ok=False):
        """Add a task to every layer, in the layer's dtype and device, without changing an output; returns self.

        `r` and `lora_alpha` default to the model's. `init="original"` draws both factors, as the original does: then
        the output does change. Raises ValueError for a task that is there, unless `exist_ok`.
        """
        check.kind(isinstance(task, str), "task", type(task).__name__, "a name")
        if exist_ok and task in self.names:
            return self
        check.value(task and task not in self.names, "task", repr(task), f"a new name, besides {self.names}")
        check.value(init in ("zero", "original"), "init", repr(init), "'zero' or 'original'")
        r = self.defaults[0] if r is None else r
        lora_alpha = self.defaults[1] if lora_alpha is None else lora_alpha
        made = [(layer, self._make(name, layer, r, lora_alpha, init)) for name, layer in self._layers()]
        for layer, module in made:
            layer.tasks[escape(task)] = module.train(layer.training)
        self.names.append(task)
        return self

    def _make(self, name, layer, r, lora_alpha, init):
        if isinstance(layer, Wrapped):
            make = custom_constructor(layer.module)
            got = f"a {type(layer.module).__name__}, whose type is registered no longer"
            check.value(make, name or "model", got, "register_base_module_wrapper to be called first")
            return make(layer.module)
        if r is None and (make := custom_constructor(layer)):
            made = make(layer)
            held = isinstance(made, TaskAdapter)
            check.kind(held, name or "model", f"a {type(made).__name__}", "an adapter, as when the model was wrapped")
            if init == "zero" and lora_alpha is None:
                return made
            r = made.r
        inside = layer.kind == "projection"
        base = self.model.get_submodule(name.rpartition(".")[0]).out_proj.weight if inside else None
        return make_adapter(layer, default_rank if r is None else r, lora_alpha, init, base)

    def remove_task(self, task):
        """Remove a task and its parameters; returns self."""
        self._known(task)
        for layer in self.lora_layers():
            del layer.tasks[escape(task)]
            layer.train(layer.training)
        self.names.remove(task)
        return self

    def _known(self, *tasks):
        for task in tasks:
            if task not in self.names:
                raise KeyError(f"fastlora: task: got {task!r}, expected one of {self.names}")

    def requires_grad_(self, requires_grad=True, task=None):
        """Train the parameters of a task, or of the base model where `task` is None, or not; returns self."""
        for parameter in (state.base_tensors(self) if task is None else state.task_tensors(self, task)).values():
            if isinstance(parameter, nn.Parameter):
                parameter.requires_grad = requires_grad
        return self

    def task(self, tasks):
        """Context manager: this thread's forwards in the block use these tasks; None or [] is the base model."""
        return selected(self.owner, *self._choose(tasks))

    def _choose(self, tasks):
        """(keys, gates) of a choice: gates (E,), (batch, E), or None where every weight is 1."""
        rows = isinstance(tasks, (list, tuple)) and not all(isinstance(t, str) for t in tasks)
        weights = [_weights(row) for row in tasks] if rows else [_weights(tasks)]
        chosen = tuple({name: None for row in weights for name in row})
        self._known(*chosen)
        keys = tuple(map(escape, chosen))
        if not rows and all(isinstance(w, int) and w == 1 for w in weights[0].values()) or not chosen:
            return keys, None
        device = next(self.parameters()).device
        listed = [row.get(name, 0) for row in weights for name in chosen]
        if any(isinstance(w, torch.Tensor) for w in listed):
            gates = torch.stack([torch.as_tensor(w, dtype=torch.float32, device=device).reshape(()) for w in listed])
        else:
            gates = torch.tensor(listed, dtype=torch.float32).to(device)
        return keys, gates.view(*((len(weights),) if rows else ()), len(chosen))

    def forward(self, *inputs, task=None, tasks=None, **kwargs):
        """The model's forward with a task, with several, or with what the thread's `task` block has chosen."""
        with self._block(task, tasks):
            return self.model(*inputs, **kwargs)

    def generate(self, *inputs, task=None, tasks=None, **kwargs):
        """The model's `generate` with these tasks."""
        with self._block(task, tasks):
            return self.model.generate(*inputs, **kwargs)

    def _block(self, task, tasks):
        check.value(task is None or tasks is None, "tasks", "task as well", "one of the two")
        chosen = tasks if task is None else task
        return selected(self.owner, *(selection(self.owner) if chosen is None else self._choose(chosen)))

    def state_dict(self, task=None, destination=None, prefix="", keep_vars=False):
        """A task's tensors, or, where `task` is None, those of the base model alone, under the model's own names.

        A task's names and layouts are the original's: "fc.<task>.module.A" (out, r), "fc.<task>.module.B" (r, in). To
        keep a training run save each task of `names`; what a Trainer writes by itself is the base model.
        """
        found = state.base_tensors(self, keep_vars) if task is None else state.saved_task(self, task, keep_vars)
        destination = collections.OrderedDict() if destination is None else destination
        destination.update((prefix + name, tensor) for name, tensor in found.items())
        return destination

    def load_state_dict(self, state_dict, strict=True, assign=None, task=None):
        """Load the base model, or a task from a file of any task, in the original's names, ours or PEFT's.

        Returns torch's (missing_keys, unexpected_keys). Raises RuntimeError as torch does for these if `strict`, and
        for shapes; then nothing has changed. `assign` as in torch, for the base model alone.
        """
        if isinstance(strict, str):
            # the original's order: state_dict, task, strict
            task, strict, assign = strict, assign is None or assign, None
        if task is not None:
            return state.load_task(self, state_dict, task, strict)
        return state.load_base(self, state_dict, strict, bool(assign))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # a parent loads its modules one by one; its state dict holds what ours does
        state.place(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def merge_and_export(self, tasks=None):
        """A plain copy of the wrapped model with W + Σ gate · ΔW of these tasks, or of those chosen in this thread."""
        keys, gates = selection(self.owner) if tasks is None else self._choose(tasks)
        if keys:
            check_merge(self.model)
        plain = copy.deepcopy(self)
        for name, layer in [*plain.named_modules(remove_duplicate=False)]:
            if isinstance(layer, Wrapped):
                plain.set_submodule(name, layer.module)
        with selected(plain.owner, keys, gates):
            return make_plain(plain.model, merged=True)


def _weights(row):
    """{name: weight} of one choice."""
    row = [] if row is None else [row] if isinstance(row, str) else row
    if isinstance(row, dict):
        for name, weight in row.items():
            number = isinstance(weight, (int, float)) or isinstance(weight, torch.Tensor) and weight.numel() == 1
            check.value(number, f"tasks[{name!r}]", f"a {type(weight).__name__}", "a number or a tensor of one")
        return row
    named = isinstance(row, (list, tuple)) and all(isinstance(name, str) for name in row)
    check.value(named, "tasks", repr(row), "a name, a list of names, a dict of weights, or a list of these")
    return {name: row.count(name) for name in row}
