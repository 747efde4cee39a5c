"""The model with a mixture of experts, and X-LoRA's functions and methods on it."""

import copy
import functools
import itertools
import warnings
import weakref

import torch

from fastlora.experts import open_experts
from fastlora.mixture import files
from fastlora.mixture.classifier import xLoRAClassifier, xLoRAConfig
from fastlora.mixture.stack import Stack, is_cross, stacks_of
from fastlora.model import disable_adapter, get_nb_trainable_parameters, make_plain, print_trainable_parameters
from fastlora.nn.bank import Owner, Wrapper, escape
from fastlora.nn.convert import like
from fastlora.ops import check

# xlora's names, of which two are every model's
__all__ = [
    "add_xlora_to_model", "disable_scalings_logging", "enable_scalings_logging", "flush_log_scalings",
    "from_pretrained", "get_nb_trainable_parameters", "print_scalings_predictions", "print_trainable_parameters",
    "set_scalings_with_lifetime", "xLoRAModel",
]  # fmt: skip

# a weak reference to the one that the first version's functions mean, which name no model
_latest = None
_numbers = itertools.count()


def latest():
    """The mixture made last. Raises RuntimeError where there is none."""
    model = _latest and _latest()
    if model is None:
        raise RuntimeError("fastlora: there is no mixture yet, expected add_xlora_to_model before")
    return model


class xLoRAModel(Wrapper):
    """A Hugging Face model, its experts frozen, and a classifier that gates them for each token.

    y = x Wᵀ + bias + Σ_e g_e · scale_e (x A_eᵀ) B_eᵀ in each adapted layer, one call; g (batch, tokens, n) comes from
    the last hidden state of the same model without experts. Made by `add_xlora_to_model`. Generation keeps a cache.
    """

    def __init__(self, model, config, adapters):
        super().__init__()
        global _latest
        size = getattr(getattr(model, "config", None), "hidden_size", None) or config.hidden_size
        fits = isinstance(size, int) and config.hidden_size in (None, size)
        check.value(fits, "hidden_size", config.hidden_size, f"{size or 'a number'}, the model's")
        check.kind(isinstance(adapters, dict), "adapters", type(adapters).__name__, "a dictionary {name: folder}")
        self.owner, self.keys, self.expert_names = Owner(), tuple(map(escape, adapters)), list(adapters)
        self.trained_before = [p for p in model.parameters() if p.requires_grad]
        layers = open_experts(model, adapters, self.owner)
        self.experts = list(layers.values())
        self.model, self.xlora_config, self.stacks = model.requires_grad_(False), copy.copy(config), []
        self.xlora_config.hidden_size = size
        try:
            self._build(layers)
        except BaseException:
            self.remove()
            raise
        self.train(model.training)
        _latest = weakref.ref(self)

    def _build(self, layers):
        config, stacks = self.xlora_config, stacks_of(self.model)
        inside = {id(module) for stack in stacks for module in stack.modules()}
        outside = [name for name, layer in layers.items() if id(layer) not in inside]
        check.value(not outside, "adapters", f"experts on {', '.join(outside)}", "layers of the transformer itself")
        self.set_topk_lora(config.top_k_lora)
        self.set_scaling_pass_value(config.scaling_pass_value)
        self.set_use_trainable_adapters(config.use_trainable_adapters)
        self.xlora_classifier = xLoRAClassifier(config, len(layers), len(self.keys), like(self.model))
        self.scalings_logging, self.log_scalings, self.latest_scalings = False, [], None
        # (gates, for how many forwards yet), how many predictions to print, what tells its caches from others'
        self.fixed, self.prints, self.number = None, 0, next(_numbers)
        cross = [layer.place for name, layer in layers.items() if is_cross(name)]
        self.stacks += [Stack(self, stack, cross, counts=stack is stacks[-1]) for stack in stacks]

    def __getstate__(self):
        # a tensor with a graph cannot be copied
        latest = self.latest_scalings
        return {**self.__dict__, "latest_scalings": latest if latest is None else latest.detach()}

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def generate(self, *args, **kwargs):
        """The model's `generate`, with its cache: but for gates of a whole sequence, which change with each token."""
        if not self.xlora_config.per_token and kwargs.get("use_cache") is not False:
            warnings.warn("fastlora: gates of a whole sequence: use_cache is switched off", stacklevel=2)
            kwargs["use_cache"] = False
        return self.model.generate(*args, **kwargs)

    def remove(self):
        """Take the mixture away again: returns the plain model, as it was before."""
        for handle in [handle for stack in self.stacks for handle in stack.handles]:
            handle.remove()
        if self.experts:
            make_plain(self.model, merged=False)
        self.stacks, self.experts = [], []
        for parameter in self.trained_before:
            parameter.requires_grad = True
        return self.model

    disable_adapter = disable_adapter
    get_nb_trainable_parameters = get_nb_trainable_parameters
    print_trainable_parameters = print_trainable_parameters

    def scaling_mark(self):
        """What the scaling pass's keys and values depend on, in words."""
        config = self.xlora_config
        names = ("scaling_pass_value", "top_k_lora", "enable_softmax_topk", "global_scaling_weight")
        of = ", ".join(f"{n} {getattr(config, n)}" for n in (names if config.scaling_pass_value else names[:1]))
        return f"mixture {self.number}, {of}"

    def scaling_pass(self):
        """(keys, gates) of the pass that the classifier reads: none for the value 0."""
        value = self.xlora_config.scaling_pass_value
        if value == 0:
            return (), None
        gates = self.xlora_classifier.last.weight.new_full((len(self.keys),), value)
        return self.keys, self.xlora_classifier.select(gates)

    def predict(self, hidden, attention_mask, input_ids):
        """The gates of one forward, kept and shown as asked."""
        scalings = self.xlora_classifier(hidden, attention_mask, input_ids)
        self.latest_scalings = shown = scalings.expand(*scalings.shape[:-2], len(self.experts), -1)
        if self.prints > 0:
            print(f"Scaling predictions: {shown}")
            self.prints -= 1
        if self.scalings_logging:
            self.log_scalings.append(shown.detach())
        return self.gates_of(scalings)

    def gates_of(self, scalings):
        """What the layers take of the classifier's output: a tensor for all, or a tuple of one for each."""
        gates = self.xlora_classifier.select(scalings).unbind(-2)
        return gates if self.xlora_config.layerwise_scalings else gates[0]

    def set_scalings_with_lifetime(self, value, n_accesses_lifetime):
        """Use the gates `value`, (batch, n), in the next so many forwards (steps of a generation), then the former."""
        fits = isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[1] == len(self.keys)
        got = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        check.value(fits, "value", got, f"a tensor (batch, {len(self.keys)})")
        whole = isinstance(n_accesses_lifetime, int) and n_accesses_lifetime > 0
        check.value(whole, "n_accesses_lifetime", repr(n_accesses_lifetime), "a positive integer")
        self.fixed = value * self.xlora_config.global_scaling_weight, n_accesses_lifetime

    def get_latest_scalings(self):
        """The classifier's last output, (batch, tokens, layers, n), or None."""
        return self.latest_scalings

    def enable_scalings_logging(self):
        """Keep every output of the classifier from now on."""
        self.scalings_logging = True

    def disable_scalings_logging(self):
        """Keep no more of them; those kept stay."""
        self.scalings_logging = False

    def clear_scalings_log(self):
        """Forget the log."""
        self.log_scalings = []

    def get_scalings_log(self):
        """The log: a list of (batch, tokens, layers, n)."""
        return list(self.log_scalings)

    def get_bucketed_scalings_log(self):
        """{number of tokens: (positions in the log, tensors)}."""
        buckets = {}
        for i, scalings in enumerate(self.log_scalings):
            positions, tensors = buckets.setdefault(scalings.shape[1], ([], []))
            positions.append(i)
            tensors.append(scalings)
        return buckets

    def flush_log_scalings(self, path):
        """Write the log to numpy files, which `load_scalings_log` reads, and forget it. Raises ValueError if empty."""
        check.value(self.log_scalings, "path", "an empty log", "enable_scalings_logging and a forward before")
        files.write_log(self.log_scalings, path)
        self.clear_scalings_log()

    def print_scalings_predictions(self, n_predictions_lifetime):
        """Print the classifier's next n outputs."""
        self.prints = n_predictions_lifetime

    def set_scaling_pass_value(self, value):
        """The gates in the pass that the classifier reads; None is 1 / n."""
        self.xlora_config.scaling_pass_value = 1 / len(self.keys) if value is None else value

    def set_global_scaling_weight(self, weight):
        """Multiply every expert's update by this."""
        self.xlora_config.global_scaling_weight = weight

    def get_global_scaling_weight(self):
        return self.xlora_config.global_scaling_weight

    def set_topk_lora(self, value):
        """Use the `value` experts with the largest gates; None: all. Raises ValueError for more than there are."""
        n = len(self.keys)
        fits = value is None or isinstance(value, int) and 1 <= value <= n
        check.value(fits, "top_k_lora", repr(value), f"None or an integer from 1 to {n}, the number of experts")
        self.xlora_config.top_k_lora = value

    def get_topk_lora(self):
        return self.xlora_config.top_k_lora

    def set_use_trainable_adapters(self, use_trainable_adapters):
        """Train the experts, or freeze them."""
        for layer in self.experts:
            layer.tasks.requires_grad_(use_trainable_adapters)
        self.xlora_config.use_trainable_adapters = use_trainable_adapters

    def get_use_trainable_adapters(self):
        return self.xlora_config.use_trainable_adapters

    save_pretrained = files.save_pretrained


def add_xlora_to_model(model, xlora_config, adapters=None, verbose=False):
    """Give a plain Hugging Face model a mixture of these experts, {name: PEFT folder}, in place; returns an xLoRAModel.

    `adapters` default to the configuration's. The model and the experts are frozen, the classifier trains. Raises
    ValueError, with the model as it was, for an expert of another model, or a field that does not fit. Source: X-LoRA.
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

    `adapters`: {name: folder}, in the classifier's order; or names, or None, of experts saved below `load_directory`.
    `device`: the classifier's. Raises ValueError or OSError, with the model as it was, for missing or unfit files.
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
