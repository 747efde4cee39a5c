"""The search for the weights of a composition on a few examples, several candidates in one forward."""

import torch
import torch.nn.functional as F
from torch import nn

from fastlora.compose.bank import named, numbers, opened
from fastlora.compose.optimise import optimise
from fastlora.model import make_plain
from fastlora.ops import check


def default_l1_regularization(weights):
    """0.05 · mean |w|."""
    return 0.05 * (sum(abs(w) for w in weights) / len(weights))


def search(model, adapters, inputs, row_losses=None, *, mode="lorahub", regular=default_l1_regularization,
           batch_size=None, **options):  # fmt: skip
    """The weights w_i with which the adapters, composed, have the smallest loss on a few examples.

    `adapters`: {name: folder in PEFT's format or tensors by name}, or a list. ΔW = (Σ w_i b_i)(Σ w_i a_i) in the mode
    "lorahub", Σ w_i b_i a_i in "sum". `inputs`: the model's tensors by argument, rows first; `labels` go to
    row_losses(outputs, inputs) -> (rows,) alone, by default each row's mean loss over its tokens of a causal or
    encoder-decoder language model. The objective is their mean over all rows, whatever `batch_size`, the number of rows
    in a forward (None: all), plus regular(w).

    Options: steps=40, candidates to evaluate; population=1, how many in one forward, which then has as many times the
    rows; method="evolution" (nevergrad) or "gradient" (Adam with lr=0.1, `population` starts); optimizer=None, a name
    or class of nevergrad's; seed=42; seconds=None and patience=None, limits in time and in evaluations that find
    nothing better; progress=False. Returns a Result: weights (N,), objective, evaluations, seconds, history. The model
    is plain and as it was afterwards, also after an error. Raises ValueError and TypeError naming the argument. Source:
    Huang et al. 2023, arXiv 2307.13269.
    """
    adapters = named(adapters)
    examples = Examples(model, inputs, row_losses, batch_size)
    with opened(model, adapters, mode) as owner:
        return optimise(lambda weights: examples.losses(owner, weights), len(adapters), regular, **options)


def merge_composed(model, adapters, weights, mode="lorahub"):
    """Give the layers of a plain model W + ΔW of the composition as new parameters, in place; returns the model.

    Raises ValueError, before anything changes, for weights of another number than the adapters.
    """
    adapters = named(adapters)
    weights = torch.tensor(list(numbers(weights, adapters).values()))
    with opened(model, adapters, mode) as owner, owner.running(weights[None]):
        return make_plain(model, merged=True)


class Examples:
    """The few examples, on the model's device, and the loss of candidates on them."""

    def __init__(self, model, inputs, row_losses, batch_size):
        check.kind(isinstance(model, nn.Module), "model", type(model).__name__, "an nn.Module")
        check.kind(hasattr(inputs, "items"), "inputs", type(inputs).__name__, "a dictionary")
        inputs = dict(inputs.items())
        for name, value in inputs.items():
            held = isinstance(value, torch.Tensor) and value.dim() > 0
            check.kind(held, f"inputs[{name!r}]", type(value).__name__, "a tensor, rows first")
        counts = {name: len(value) for name, value in inputs.items()}
        same = len(set(counts.values())) == 1 and min(counts.values()) > 0
        check.value(same, "inputs", f"rows {counts}", "the same number of rows, at least 1")
        whole = batch_size is None or isinstance(batch_size, int) and batch_size >= 1
        check.value(whole, "batch_size", repr(batch_size), "an integer of at least 1 or None")
        parameter = next(model.parameters())
        self.model, self.rows = model, next(iter(counts.values()))
        self.inputs = {name: value.to(parameter.device) for name, value in inputs.items()}
        self.size, self.tiled = batch_size or self.rows, {}
        self.row_losses = row_losses or self._language_model()

    def _language_model(self):
        labels = self.inputs.get("labels")
        check.value(labels is not None, "inputs", f"{list(self.inputs)}", "labels, or row_losses besides")
        counted = bool((labels != -100).any(-1).all())
        check.value(counted, "labels", "a row of -100 alone", "a token to predict in each row")
        encodes = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        if encodes and "decoder_input_ids" not in self.inputs:
            self.inputs["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=labels)
        return lambda outputs, inputs: language_losses(outputs.logits, inputs["labels"], shift=not encodes)

    def losses(self, owner, weights):
        """(P,) of weights (P, N): the mean over all rows of each row's loss."""
        P, found = len(weights), []
        weights = weights.to(next(iter(self.inputs.values())).device)
        if P not in self.tiled:
            parts = zip(*(value.split(self.size) for value in self.inputs.values()), strict=True)
            self.tiled[P] = [{k: v.repeat(P, *(1 for _ in v.shape[1:])) for k, v in zip(self.inputs, part, strict=True)}
                             for part in parts]  # fmt: skip
        for inputs in self.tiled[P]:
            rows = len(next(iter(inputs.values())))
            with owner.running(weights, *inputs.values()):
                outputs = self.model(**{name: value for name, value in inputs.items() if name != "labels"})
            losses = self.row_losses(outputs, inputs)
            got = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
            check.value(got == (rows,), "row_losses", got, f"a loss for each row, ({rows},)")
            found.append(losses.float().view(P, -1))
        return torch.cat(found, 1).mean(1)


def language_losses(logits, labels, shift):
    """Each row's mean over its tokens of the cross entropy; the logits of one token are for the next if `shift`."""
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view(labels.shape)
    return losses.sum(1) / (labels != -100).sum(1).clamp(min=1)
