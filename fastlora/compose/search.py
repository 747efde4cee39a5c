"""Weights of a composition that minimise a loss on a few examples: by nevergrad, several at a time, or by gradients."""

import dataclasses
import math
import sys
import time

import numpy
import torch
import torch.nn.functional as F

from fastlora.compose.bank import named, numbers, opened
from fastlora.model import make_plain
from fastlora.nn.layer import whole
from fastlora.ops import check

BOUND = 1.5
# nevergrad's for several candidates at a time: with those NGOpt is another program, and a weaker one
PARALLEL = "LhsDE"


@dataclasses.dataclass
class Result:
    """What a search found: the best `weights` (N,) and their objective; history: (evaluations, seconds, best)."""

    weights: torch.Tensor
    objective: float
    evaluations: int
    seconds: float
    history: list


def default_l1_regularization(weights):
    """0.05 · mean |w|."""
    return 0.05 * (sum(abs(w) for w in weights) / len(weights))


def search(model, adapters, inputs, row_losses=None, *, mode="lorahub", regular=default_l1_regularization,
           batch_size=None, **options):  # fmt: skip
    """The weights w_i with which the adapters, composed, have the smallest loss on a few examples.

    `adapters`: {name: folder in PEFT's format or tensors by name}, or a list. ΔW = (Σ w_i b_i)(Σ w_i a_i) in the mode
    "lorahub", Σ w_i b_i a_i in "sum". `inputs`: the model's tensors by argument, rows first; `labels` go to
    row_losses(outputs, inputs) -> (rows,) alone, by default each row's mean loss over its tokens of a causal or
    encoder-decoder model. The objective is the mean of all rows, `batch_size` a forward (None: all), plus regular(w).

    Options: steps=40, candidates to evaluate; population=1, how many in one forward, which then has as many times the
    rows; method="evolution" (nevergrad) or "gradient" (Adam with lr=0.1, `population` starts); optimizer=None, a name
    or class of nevergrad's; seed=42; seconds=None and patience=None, limits in time and in evaluations that find
    nothing better; progress=False. Returns a Result. The model is plain and as it was afterwards, also after an error.
    Raises ValueError and TypeError naming the argument. Source: Huang et al. 2023, arXiv 2307.13269.
    """
    adapters = named(adapters)
    with opened(model, adapters, mode) as owner:
        examples = Examples(model, inputs, row_losses, batch_size)
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
        check.kind(hasattr(inputs, "items"), "inputs", type(inputs).__name__, "a dictionary")
        self.model, self.device = model, next(model.parameters()).device
        for name, value in inputs.items():
            held = isinstance(value, torch.Tensor) and value.dim() > 0
            check.kind(held, f"inputs[{name!r}]", type(value).__name__, "a tensor, rows first")
        self.inputs = {name: value.to(self.device) for name, value in inputs.items()}
        counts = {name: len(value) for name, value in self.inputs.items()}
        same = len(set(counts.values())) == 1 and min(counts.values()) > 0
        check.value(same, "inputs", f"rows {counts}", "the same number of rows, at least 1")
        fits = batch_size is None or isinstance(batch_size, int) and batch_size >= 1
        check.value(fits, "batch_size", repr(batch_size), "an integer of at least 1 or None")
        self.size = batch_size or max(counts.values())
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
        for part in zip(*(value.split(self.size) for value in self.inputs.values()), strict=True):
            inputs = {k: v.repeat(P, *(1 for _ in v.shape[1:])) for k, v in zip(self.inputs, part, strict=True)}
            with owner.running(weights.to(self.device), *inputs.values()):
                outputs = self.model(**{name: value for name, value in inputs.items() if name != "labels"})
            losses, rows = self.row_losses(outputs, inputs), P * len(part[0])
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


def optimise(evaluate, count, regular, *, steps=40, population=1, method="evolution", seed=42, optimizer=None, lr=0.1,
             seconds=None, patience=None, progress=False):  # fmt: skip
    """The weights w (N,) in [-1.5, 1.5] with the smallest evaluate(w (P, N)) -> losses (P,), plus regular(w).

    The options are those of `search`; by gradients whole rounds are evaluated. Returns a Result.
    """
    check.value(method in ("evolution", "gradient"), "method", repr(method), "'evolution' or 'gradient'")
    for name, number in (("steps", steps), ("population", population)):
        check.value(whole(number) and number >= 1, name, repr(number), "an integer of at least 1")
    if method == "gradient":
        check.value(optimizer is None, "optimizer", repr(optimizer), "none: gradients are followed by Adam")
        rounds = _descend(evaluate, count, regular, steps, population, seed, lr)
    else:
        rounds = _evolve(evaluate, count, regular, steps, population, seed, optimizer)
    start, since, found = time.perf_counter(), 0, Result(None, math.inf, 0, 0.0, [])
    for weights, objectives in rounds:
        objectives = [math.inf if math.isnan(objective) else objective for objective in objectives]
        at = min(range(len(objectives)), key=objectives.__getitem__)
        since += len(objectives)
        if found.weights is None or objectives[at] < found.objective:
            found.weights, found.objective, since = weights[at].clone(), objectives[at], 0
        found.evaluations, found.seconds = found.evaluations + len(objectives), time.perf_counter() - start
        found.history.append((found.evaluations, found.seconds, found.objective))
        late = seconds is not None and found.seconds >= seconds or patience is not None and since >= patience
        last = late or found.evaluations >= steps
        if progress:
            said = f"\r{found.evaluations:4}/{steps} evaluations, best {found.objective:.4f}"
            print(said, end="\n" if last else "", file=sys.stderr)
        if last:
            break
    return found


def _evolve(evaluate, count, regular, steps, population, seed, optimizer):
    """Rounds of (candidates (P, N), their objectives) by nevergrad."""
    try:
        import nevergrad as ng
    except ImportError as error:
        needs = "the search without gradients needs nevergrad: pip install nevergrad, or method='gradient'"
        raise ImportError(f"fastlora: {needs}") from error
    space = ng.p.Array(init=[0] * count, lower=[-BOUND] * count, upper=[BOUND] * count)
    # what numpy.random.seed(seed) gives, without touching the program's own generator
    seed = numpy.random.RandomState(seed).randint(2**32, dtype=numpy.uint32)
    space.random_state = numpy.random.RandomState(seed)
    make = optimizer or ("NGOpt" if population == 1 else PARALLEL)
    if isinstance(make, str):
        known = "a name in nevergrad.optimizers.registry, or such a class"
        check.value(make in ng.optimizers.registry, "optimizer", repr(make), known)
        make = ng.optimizers.registry[make]
    search = make(parametrization=space, budget=steps, num_workers=population)
    if population > 1:
        # the plain model, with which NGOpt begins by itself
        search.suggest([0] * count)
    for done in range(0, steps, population):
        asked = [search.ask() for _ in range(min(population, steps - done))]
        weights = torch.tensor(numpy.stack([candidate.value for candidate in asked]), dtype=torch.float32)
        with torch.no_grad():
            losses = evaluate(weights).tolist()
        objectives = [loss + float(regular(c.value)) for loss, c in zip(losses, asked, strict=True)]
        for candidate, objective in zip(asked, objectives, strict=True):
            search.tell(candidate, objective)
        yield weights, objectives


def _descend(evaluate, count, regular, steps, population, seed, lr):
    """The same by Adam, from `population` starts."""
    # of the products of two sums w = 0 is a saddle: no gradient
    starts = torch.randn(population, count, generator=torch.Generator().manual_seed(seed)) / count
    starts[0] = 1 / count
    weights = starts.requires_grad_()
    adam = torch.optim.Adam([weights], lr=lr)
    for _ in range(0, steps, population):
        with torch.enable_grad():
            objectives = evaluate(weights) + torch.stack([torch.as_tensor(regular(w)) for w in weights])
            (weights.grad,) = torch.autograd.grad(objectives.sum(), weights)
        yield weights.detach(), objectives.tolist()
        adam.step()
        with torch.no_grad():
            weights.clamp_(-BOUND, BOUND)
