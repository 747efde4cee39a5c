"""X-LoRA's functions. Those of its first version that name no model mean the mixture that was made last."""

import functools

import torch

from fastlora.mixture import files
from fastlora.mixture.config import xLoRAConfig
from fastlora.mixture.model import latest, xLoRAModel
from fastlora.ops import check


def add_xlora_to_model(model, xlora_config, adapters=None, verbose=False):
    """Give a plain Hugging Face model a mixture of these experts, {name: PEFT folder}, in place; returns an xLoRAModel.

    `adapters` default to the configuration's. The model and the experts are frozen, the classifier trains. Raises
    ValueError, with the model as it was, for an expert of another model, or a field that does not fit. Source: X-LoRA,
    Buehler and Buehler 2024, arXiv 2402.07148.
    """
    if isinstance(adapters, bool):
        # the later version's order: model, configuration, verbose
        adapters, verbose = None, adapters
    check.kind(isinstance(xlora_config, xLoRAConfig), "xlora_config", type(xlora_config).__name__, "an xLoRAConfig")
    adapters = xlora_config.adapters if adapters is None else adapters
    mixture = xLoRAModel(model, xlora_config, adapters)
    folders = {name: None if isinstance(source, dict) else str(source) for name, source in adapters.items()}
    mixture.xlora_config.adapters = folders
    if verbose:
        print(f"{len(mixture.expert_names)} experts on {len(mixture.experts)} layers")
    return mixture


def from_pretrained(load_directory, model, adapters=None, verbose=False, device=None, from_safetensors=True):
    """A mixture from a folder of xlora's or of PEFT's, on a plain model, in place; returns an xLoRAModel.

    `adapters`: {name: folder}, in the order that the classifier was trained with; or a list of names, or None, of
    experts that were saved below `load_directory`. `device`: the classifier's. Raises ValueError or OSError, with the
    model as it was, for files that are missing or do not fit.
    """
    config, peft = files.read_config(load_directory)
    names = config.adapters or ()
    if not isinstance(adapters, dict):
        adapters = files.expert_folders(load_directory, names if adapters is None else adapters)
    if set(adapters) == set(names):
        # the classifier's order
        adapters = {name: adapters[name] for name in names}
    count = len(adapters) == len(names) or not names
    check.value(count, "adapters", f"{len(adapters)} experts", f"{len(names)}, as the classifier was trained with")
    config.device = None if device is None else torch.device(device)
    mixture = add_xlora_to_model(model, config, adapters, verbose)
    try:
        tensors = files.read_classifier(load_directory, mixture.xlora_classifier, peft, from_safetensors)
        mixture.xlora_classifier.load_state_dict(tensors)
    except BaseException:
        mixture.remove()
        raise
    return mixture


def _of_the_latest(method):
    @functools.wraps(method)
    def function(*args):
        return method(latest(), *args)

    return function


enable_scalings_logging = _of_the_latest(xLoRAModel.enable_scalings_logging)
flush_log_scalings = _of_the_latest(xLoRAModel.flush_log_scalings)
print_scalings_predictions = _of_the_latest(xLoRAModel.print_scalings_predictions)
set_scalings_with_lifetime = _of_the_latest(xLoRAModel.set_scalings_with_lifetime)


def disable_scalings_logging():
    """Keep no more outputs of the classifier, and forget those kept, as the first version does."""
    latest().disable_scalings_logging()
    latest().clear_scalings_log()
