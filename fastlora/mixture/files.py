"""A mixture's folder, in the format of xlora or of PEFT, and its log's files."""

import dataclasses
import json
import pathlib

import numpy
import torch
from safetensors.torch import load_file, save_file

from fastlora.experts import save_expert
from fastlora.mixture.classifier import xLoRAConfig
from fastlora.ops import check

_FIELDS = {field.name: field.default for field in dataclasses.fields(xLoRAConfig)}
# what xlora's own configuration does not have, and PEFT's neither
_OURS = ("stop_token_id", "use_mean_pool", "per_token")
_NOT_PEFT = (*_OURS, "base_model_id", "device", "enable_relu_and_dropout", "use_bias")
_PEFT_KEY = "base_model.internal_xlora_classifier.layers."


def save_pretrained(mixture, save_directory, safe_serialization=True, is_main_process=True, names="xlora"):
    """Write the mixture as a folder of xlora's or of PEFT's ("peft"), with each expert in one of its own below."""
    check.value(names in ("xlora", "peft"), "names", repr(names), "'xlora' or 'peft'")
    directory = pathlib.Path(save_directory)
    check.value(not directory.is_file(), "save_directory", f"{directory}, a file", "a directory")
    if not is_main_process:
        return
    experts = {n: directory / (n if names == "xlora" else str(i)) for i, n in enumerate(mixture.expert_names)}
    below = {f.resolve() for f in experts.values() if directory.resolve() in f.resolve().parents}
    check.value(len(below) == len(experts), "adapters", list(experts), "names that can be folders of their own")
    own = json.dumps(_description(mixture.xlora_config, experts, names), indent=2) + "\n"
    classifier = mixture.xlora_classifier
    tensors = {k: t.detach().cpu().contiguous() for k, t in classifier.state_dict().items()}
    for name, folder in experts.items():
        save_expert(mixture.model, name, folder)
    # what an earlier save has left in the other format
    for file in ("xlora_config.json", "xlora_classifier.safetensors", "xlora_classifier.pt"):
        (directory / file).unlink(missing_ok=True)
    (directory / ("adapter_config.json" if names == "peft" else "xlora_config.json")).write_text(own, encoding="utf-8")
    if names == "peft":
        theirs = _peft_names(classifier)
        save_file({theirs[name]: t for name, t in tensors.items()}, directory / "adapter_model.safetensors")
    elif safe_serialization:
        save_file(tensors, directory / "xlora_classifier.safetensors")
    else:
        torch.save(tensors, directory / "xlora_classifier.pt")


def _description(config, experts, names):
    given = dataclasses.asdict(config)
    kept = {name: value for name, value in given.items() if name not in _OURS or value != _FIELDS[name]}
    if names == "xlora":
        del kept["device"]
        return {**kept, "adapters": list(experts)}
    plain = config.use_bias and (config.enable_relu_and_dropout or config.xlora_depth == 1) and config.per_token
    check.value(plain, "names", "'peft' for a classifier without bias, ReLU or gates for each token", "'xlora'")
    kept = {name: value for name, value in kept.items() if name not in _NOT_PEFT}
    adapters = {folder.name: str(folder.resolve()) for folder in experts.values()}
    return {"peft_type": "XLORA", "inference_mode": True, **kept, "adapters": adapters}


def _peft_names(classifier):
    """{a tensor's name: PEFT's}, which numbers the linear layers together with the ReLUs and dropouts between them."""
    step, names = 3 if classifier.config.xlora_dropout_p > 0 else 2, enumerate(classifier.state_dict())
    # a weight and a bias each
    return {name: f"{_PEFT_KEY}{i // 2 * step}.{name.rpartition('.')[2]}" for i, name in names}


def _read_peft(directory, classifier):
    """The classifier's tensors in PEFT's folder, whose 0.21 files layers.0 as the expert "0"'s and drops the number."""
    tensors = load_file(directory / "adapter_model.safetensors")
    for file in directory.glob("[0-9]*/adapter_model.safetensors"):
        for name, tensor in load_file(file).items():
            end = name.removeprefix(_PEFT_KEY)
            if end in ("weight", "bias"):
                tensors.setdefault(f"{_PEFT_KEY}{file.parent.name}.{end}", tensor)
    ours = {theirs: name for name, theirs in _peft_names(classifier).items()}
    return {ours.get(name, name): tensor for name, tensor in tensors.items()}


def read_config(directory):
    """(xLoRAConfig, whether it is PEFT's) of a mixture's folder; `adapters` as it stands there."""
    file, theirs = (pathlib.Path(directory, name) for name in ("xlora_config.json", "adapter_config.json"))
    peft = theirs.exists() and not file.exists()
    given = json.loads((theirs if peft else file).read_text(encoding="utf-8"))
    right = not peft or given.get("peft_type") == "XLORA"
    check.value(right, "load_directory", f"an adapter of type {given.get('peft_type')!r}", "a mixture's folder")
    return xLoRAConfig(**{name: given[name] for name in _FIELDS.keys() & given.keys()}), peft


def expert_folders(directory, names):
    """{name: folder} of experts that were saved with a mixture; `names` are a list, or PEFT's {name: folder}.

    PEFT's come first: what PEFT 0.21 itself writes below a mixture's folder is not its experts.
    """
    directory, found = pathlib.Path(directory), {}
    for name in names:
        noted = [pathlib.Path(names[name])] if isinstance(names, dict) and names[name] else []
        places = [place for place in (*noted, directory / name, directory / "adapters" / name) if place.is_dir()]
        check.value(places, "adapters", f"no folder of {name} in {directory}", "{name: folder} of each expert")
        found[name] = places[0]
    return found


def read_classifier(directory, classifier, peft, from_safetensors):
    """The classifier's tensors. Raises ValueError for missing, unexpected or misshapen ones."""
    directory = pathlib.Path(directory)
    if peft:
        tensors = _read_peft(directory, classifier)
    elif from_safetensors:
        tensors = load_file(directory / "xlora_classifier.safetensors")
    else:
        tensors = torch.load(directory / "xlora_classifier.pt", map_location="cpu", weights_only=True)
    got, want = ({k: tuple(t.shape) for k, t in held.items()} for held in (tensors, classifier.state_dict()))
    wrong = {name: got.get(name) for name in got | want if got.get(name) != want.get(name)}
    check.value(not wrong, f"the classifier in {directory}", wrong, {name: want.get(name) for name in wrong})
    return tensors


def write_log(log, path):
    """`path`.npy, or a file for each shape and `path`-mapping.json, which says where in the log its tensors stood."""
    mapping = {}
    for i, scalings in enumerate(log):
        mapping.setdefault(f"{path}-{scalings.shape[1]}-{scalings.shape[0]}.npy", []).append(i)
    for file, places in mapping.items():
        stacked = torch.stack([log[i] for i in places]).float().cpu()
        numpy.save(file if len(mapping) > 1 else f"{path}.npy", stacked.numpy())
    pathlib.Path(f"{path}-mapping.json").unlink(missing_ok=True)
    if len(mapping) > 1:
        pathlib.Path(f"{path}-mapping.json").write_text(json.dumps(mapping), encoding="utf-8")


def load_scalings_log(path, verbose=False):
    """The log that `flush_log_scalings(path)` has written: a list of (batch, tokens, layers, n)."""
    mapping = pathlib.Path(f"{path}-mapping.json")
    files = json.loads(mapping.read_text()) if mapping.exists() else {f"{str(path).removesuffix('.npy')}.npy": None}
    log = {}
    for file, places in files.items():
        stacked = torch.from_numpy(numpy.load(file))
        log.update(zip(places or range(len(stacked)), stacked, strict=True))
    return [log[i] for i in sorted(log)]
