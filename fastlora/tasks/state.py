"""State dicts of a model with tasks: the base model's tensors, and one task's."""

import torch
from torch.nn.modules.module import _IncompatibleKeys

from fastlora.checkpoint.state import compare, join, owner
from fastlora.nn import names
from fastlora.nn.bank import Wrapped, escape
from fastlora.ops import check


def base_tensors(model, keep_vars=True):
    """{name: tensor} of the base model, under the names it had before it was wrapped."""
    return {plain: tensor for plain, (_, tensor) in _base(model, keep_vars)[0].items()}


def _base(model, keep_vars=True):
    """({plain name: (name inside, tensor)}, {plain name, or the original's, as "fc.module.weight": plain name})."""
    layers, base, originals = dict(model._layers(every_name=True)), {}, {}
    for name, tensor in model.model.state_dict(keep_vars=keep_vars).items():
        path, rest = owner(layers, name)
        if path is None:
            base[name] = name, tensor
        elif not rest.startswith("tasks."):
            # a user's wrapped module keeps its own tensors below `module`
            rest = rest.removeprefix("module.") if isinstance(layers[path], Wrapped) else rest
            base[join(path, rest)] = name, tensor
            originals[join(path, f"module.{rest}")] = join(path, rest)
    return base, originals | {name: name for name in base}


def place(model, given, prefix):
    """Rename, in place, what a parent's state dict holds of the base model below `prefix`; tasks stay as they are."""
    base, known = _base(model)
    for key in [key for key in given if key.startswith(prefix)]:
        plain = known.get(key[len(prefix) :])
        given[key if plain is None else f"{prefix}model.{base[plain][0]}"] = given.pop(key)
    inside = {name for name, _ in base.values()}
    for name, tensor in model.model.state_dict(keep_vars=True).items():
        if name not in inside:
            given.setdefault(f"{prefix}model.{name}", tensor)


def load_base(model, given, strict, assign):
    """Load the base model."""
    base, known = _base(model)
    plain = {known.get(name, name): tensor for name, tensor in given.items()}
    report = _report({name: tensor for name, (_, tensor) in base.items()}, plain, strict)
    inside = {base[name][0]: tensor for name, tensor in plain.items() if name in base}
    model.model.load_state_dict(inside, strict=False, assign=assign)
    return report


def task_tensors(model, task):
    """{name: parameter} of a task, below the layers' names."""
    model._known(task)
    each = ((path, layer.tasks[escape(task)]) for path, layer in model._layers())
    return {join(path, name): t for path, module in each for name, t in module.state_dict(keep_vars=True).items()}


def saved_task(model, task, keep_vars):
    """A task's tensors under the original's names."""
    model._known(task)
    tensors = {}
    for path, layer in model._layers():
        own = layer.tasks[escape(task)].state_dict(keep_vars=keep_vars)
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
    # a task may be called base_layer
    found = {key: _parse(key, kinds, task) or _parse(names.from_any_name(key), kinds, task) for key in given}
    sources = {place[0] for place in found.values() if place}
    source = task if task in sources or not sources else next(place[0] for place in found.values() if place)
    check.value(len(sources) < 2 or source == task, "state_dict", f"the tasks {sorted(map(str, sources))}",
                f"one task, or {task!r} among them")  # fmt: skip
    tensors, others = {}, []
    for key, place in found.items():
        if not place or place[0] != source:
            others.append(key)
            continue
        path, name, tensor = *place[1:], given[key]
        if kinds[path] and name in ("A", "B"):
            # one of the two, in our layout; a user's module keeps its own names
            A, B = names.to_tasks(kinds[path], *(tensor if name == letter else None for letter in "AB"))
            name, tensor = ("lora_A", A) if B is None else ("lora_B", B)
        tensors[join(path, name)] = tensor
    report = _report(own, tensors, strict, others)
    for name in own.keys() & tensors.keys():
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


def _report(own, given, strict, unexpected=()):
    """torch's report on the keys; RuntimeError for shapes, and for keys if `strict`, before anything is loaded."""
    missing, more, wrong = compare(own, given)
    unexpected = [*unexpected, *more]
    if wrong or strict and (missing or unexpected):
        lists = (("missing", missing), ("unexpected", unexpected), ("wrong shapes", wrong))
        found = "; ".join(f"{what}: {', '.join(keys)}" for what, keys in lists if keys)
        raise RuntimeError(f"fastlora: state_dict: {found}; nothing was loaded")
    return _IncompatibleKeys(missing, unexpected)
