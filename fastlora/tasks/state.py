"""State dicts of a model with tasks: the base model's tensors, and one task's."""

import torch
from torch.nn.modules.module import _IncompatibleKeys

from fastlora.checkpoint.state import join, owner
from fastlora.nn import names
from fastlora.nn.bank import Wrapped, escape
from fastlora.ops import check


def base_tensors(model):
    """{name: tensor} of the base model, under the names it had before it was wrapped."""
    return {plain: tensor for plain, (_, tensor) in _base(model).items()}


def _base(model):
    """{plain name: (name inside, tensor)}; a user's wrapped module keeps its own tensors below `module`."""
    layers, base = dict(model._layers(every_name=True)), {}
    for name, tensor in model.model.state_dict(keep_vars=True).items():
        path, rest = owner(layers, name)
        if path is None:
            base[name] = name, tensor
        elif not rest.startswith("tasks."):
            wrapped = isinstance(layers[path], Wrapped)
            base[join(path, rest.removeprefix("module.") if wrapped else rest)] = name, tensor
    return base


def _plain(model, base, given):
    """`given` with the original's "fc.module.weight" as "fc.weight"."""
    layers, plain = dict(model._layers(every_name=True)), {}
    for name, tensor in given.items():
        path, rest = owner(layers, name)
        original = path is not None and name not in base and rest.startswith("module.")
        plain[join(path, rest.removeprefix("module.")) if original else name] = tensor
    return plain


def place(model, given, prefix):
    """Rename, in place, what a parent's state dict holds of the base model below `prefix`; tasks stay as they are."""
    base, keys = _base(model), [key for key in given if key.startswith(prefix)]
    plain = _plain(model, base, {key[len(prefix) :]: given.pop(key) for key in keys})
    given.update((f"{prefix}model.{base[n][0]}" if n in base else prefix + n, t) for n, t in plain.items())
    inside = {name for name, _ in base.values()}
    for name, tensor in model.model.state_dict(keep_vars=True).items():
        if name not in inside:
            given.setdefault(f"{prefix}model.{name}", tensor)


def load_base(model, given, strict, assign):
    base = _base(model)
    plain = _plain(model, base, given)
    report = _compare({name: tensor for name, (_, tensor) in base.items()}, plain, strict)
    inside = {base[name][0]: tensor for name, tensor in plain.items() if name in base}
    model.model.load_state_dict(inside, strict=False, assign=assign)
    return report


def task_tensors(model, task):
    """{name below the model, without the task's: parameter} of a task."""
    model._known(task)
    each = ((path, layer.tasks[escape(task)]) for path, layer in model._layers())
    return {join(path, name): p for path, module in each for name, p in module.state_dict(keep_vars=True).items()}


def saved_task(model, task):
    """A task's tensors under the original's names."""
    model._known(task)
    tensors = {}
    for path, layer in model._layers():
        own = layer.tasks[escape(task)].state_dict(keep_vars=True)
        if not isinstance(layer, Wrapped):
            A, B = names.to_tasks(layer.kind, own["lora_A"], own["lora_B"])
            own = {"A": A.contiguous(), "B": B.contiguous()}
        tensors.update((join(path, f"{task}.module.{name}"), tensor) for name, tensor in own.items())
    return tensors


@torch.no_grad()
def load_task(model, given, task, strict):
    """Load a task from a file of this or of one other task."""
    own = task_tensors(model, task)
    kinds = {path: None if isinstance(layer, Wrapped) else layer.kind for path, layer in model._layers()}
    sources, unexpected = {}, []
    for key, tensor in given.items():
        # a task may be called base_layer
        found = _parse(key, kinds, task) or _parse(names.from_any_name(key), kinds, task)
        if found is None:
            unexpected.append(key)
        else:
            source, *place = found
            sources.setdefault(source, {})[tuple(place)] = tensor
    source = task if task in sources else next(iter(sources), task)
    got = f"the tasks {sorted(map(str, sources))}"
    check.value(source == task or len(sources) == 1, "state_dict", got, f"one task, or {task!r} among them")
    tensors = _in_our_layout(sources.get(source, {}), kinds)
    others = [join(path, name) for s, of in sources.items() if s != source for path, name in of]
    report = _compare(own, tensors, strict, unexpected + others)
    for name in tensors.keys() & own:
        own[name].copy_(tensors[name])
    return report


def _parse(key, kinds, task):
    """(task, layer's name, parameter's name) of a key, or None."""
    path, rest = owner(kinds, key)
    if path is None:
        return None
    if rest in ("lora_A", "lora_B"):
        return None, path, rest
    if rest.startswith(f"{task}.module."):
        return task, path, rest[len(task) + 8 :]
    # a task's name may hold dots and the word itself; a custom module's parameter too
    source, found, name = rest.rpartition(".module.") if kinds[path] else rest.partition(".module.")
    return (source, path, name) if found else None


def _in_our_layout(tensors, kinds):
    """{name below the model: tensor}, with lora_A and lora_B of a layer from A and B."""
    ours = {place: tensor for place, tensor in tensors.items() if place[1] not in ("A", "B") or not kinds[place[0]]}
    for path in {path for path, _ in tensors.keys() - ours}:
        A, B = (tensors.get((path, name)) for name in "AB")
        pair = zip(("lora_A", "lora_B"), names.to_tasks(kinds[path], A, B), strict=True)
        ours.update(((path, name), tensor) for name, tensor in pair if tensor is not None)
    return {join(*place): tensor for place, tensor in ours.items()}


def _compare(own, given, strict, unexpected=()):
    """torch's report on the keys; RuntimeError for shapes, and for keys if `strict`, before anything is loaded."""
    missing = [name for name in own if name not in given]
    unexpected = [*unexpected, *(name for name in given if name not in own)]
    wrong = [
        f"{name}: got shape {tuple(t.shape)}, expected {tuple(own[name].shape)}"
        for name, t in given.items()
        if name in own and isinstance(t, torch.Tensor) and t.shape != own[name].shape
    ]
    if wrong or strict and (missing or unexpected):
        lists = (("missing", missing), ("unexpected", unexpected), ("wrong shapes", wrong))
        found = "; ".join(f"{what}: {', '.join(keys)}" for what, keys in lists if keys)
        raise RuntimeError(f"fastlora: state_dict: {found}; nothing was loaded")
    return _IncompatibleKeys(missing, unexpected)
