"""Weights that minimise an objective: by nevergrad, one or several candidates at a time, or by gradients."""

import dataclasses
import importlib
import sys
import time

import torch

from fastlora.ops import check

BOUND = 1.5
METHODS = ("evolution", "gradient")
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


class _Record:
    """The best candidate so far, and whether to go on."""

    def __init__(self, steps, seconds, patience, progress):
        self.steps, self.limit, self.patience, self.progress = steps, seconds, patience, progress
        self.start, self.count, self.since, self.best, self.history = time.perf_counter(), 0, 0, None, []

    def add(self, weights, objectives):
        """Note evaluated candidates (P, N) and their objectives, P numbers."""
        objectives = [objective if objective == objective else float("inf") for objective in objectives]
        at = min(range(len(objectives)), key=objectives.__getitem__)
        self.count += len(objectives)
        self.since += len(objectives)
        if self.best is None or objectives[at] < self.best[1]:
            self.best, self.since = (weights[at].clone(), objectives[at]), 0
        self.history.append((self.count, time.perf_counter() - self.start, self.best[1]))
        if self.progress:
            ended = "" if self.goes_on() else "\n"
            print(f"\r{self.count:4}/{self.steps} evaluations, best {self.best[1]:.4f}", end=ended, file=sys.stderr)

    def goes_on(self):
        late = self.limit is not None and time.perf_counter() - self.start >= self.limit
        patient = self.patience is None or self.since < self.patience
        return self.best is None or self.count < self.steps and patient and not late

    def result(self):
        return Result(*self.best, self.count, time.perf_counter() - self.start, self.history)


def optimise(
    evaluate, count, regular, *, steps=40, population=1, method="evolution", seed=42, optimizer=None, lr=0.1,
    seconds=None, patience=None, progress=False,
):  # fmt: skip
    """The weights w (N,) in [-1.5, 1.5] with the smallest evaluate(w (P, N)) -> losses (P,), plus regular(w).

    `steps` is the number of candidates evaluated (by gradients in whole rounds). "evolution" asks nevergrad for
    `population` at a time; "gradient" descends by Adam from as many starts. Returns a Result. Raises ValueError naming
    the argument.
    """
    check.value(method in METHODS, "method", repr(method), "'evolution' or 'gradient'")
    for name, number in (("steps", steps), ("population", population)):
        whole = isinstance(number, int) and not isinstance(number, bool) and number >= 1
        check.value(whole, name, repr(number), "an integer of at least 1")
    record = _Record(steps, seconds, patience, progress)
    if method == "gradient":
        check.value(optimizer is None, "optimizer", repr(optimizer), "none: gradients are followed by Adam")
        _descend(record, evaluate, count, regular, population, seed, lr)
    else:
        _evolve(record, evaluate, count, regular, population, seed, optimizer)
    return record.result()


def _evolve(record, evaluate, count, regular, population, seed, optimizer):
    ng, numpy = nevergrad(), importlib.import_module("numpy")
    space = ng.p.Array(init=[0] * count, lower=[-BOUND] * count, upper=[BOUND] * count)
    # what numpy.random.seed(seed) gives, without touching the program's own generator
    seed = numpy.random.RandomState(seed).randint(2**32, dtype=numpy.uint32)
    space.random_state = numpy.random.RandomState(seed)
    optimizer = optimizer or ("NGOpt" if population == 1 else PARALLEL)
    known = not isinstance(optimizer, str) or optimizer in ng.optimizers.registry
    check.value(known, "optimizer", repr(optimizer), "a name in nevergrad.optimizers.registry, or such a class")
    make = ng.optimizers.registry[optimizer] if isinstance(optimizer, str) else optimizer
    search = make(parametrization=space, budget=record.steps, num_workers=population)
    if population > 1:
        # the plain model, with which NGOpt begins by itself
        search.suggest([0] * count)
    while record.goes_on():
        asked = [search.ask() for _ in range(min(population, record.steps - record.count))]
        weights = torch.tensor(numpy.stack([candidate.value for candidate in asked]), dtype=torch.float32)
        with torch.no_grad():
            losses = evaluate(weights).tolist()
        objectives = [loss + float(regular(c.value)) for loss, c in zip(losses, asked, strict=True)]
        for candidate, objective in zip(asked, objectives, strict=True):
            search.tell(candidate, objective)
        record.add(weights, objectives)


def _descend(record, evaluate, count, regular, population, seed, lr):
    # of the products of two sums w = 0 is a saddle: no gradient
    starts = torch.randn(population, count, generator=torch.Generator().manual_seed(seed)) / count
    starts[0] = 1 / count
    weights = starts.requires_grad_()
    adam = torch.optim.Adam([weights], lr=lr)
    while record.goes_on():
        with torch.enable_grad():
            objectives = evaluate(weights) + torch.stack([torch.as_tensor(regular(w)) for w in weights])
            (weights.grad,) = torch.autograd.grad(objectives.sum(), weights)
        record.add(weights.detach(), objectives.tolist())
        adam.step()
        with torch.no_grad():
            weights.clamp_(-BOUND, BOUND)


def nevergrad():
    """The optional package."""
    try:
        return importlib.import_module("nevergrad")
    except ImportError as error:
        needs = "the search without gradients needs nevergrad: pip install nevergrad, or method='gradient'"
        raise ImportError(f"fastlora: {needs}") from error
