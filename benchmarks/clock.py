"""Interleaved, paired timing: a round times every method once, in a new order, and ratios are taken within a round."""

import contextlib
import os
import random
import resource
import statistics
import time
from dataclasses import dataclass, field

import torch
from torch.profiler import ProfilerActivity, profile

SAMPLE_SECONDS = 1e-3


@dataclass
class Timing:
    """Seconds per call of each method, one entry a round, and how many disturbed samples were thrown away."""

    seconds: dict
    calls: int
    dropped: dict = field(default_factory=dict)

    def quantiles(self, method):
        return quantiles(self.seconds[method])

    def ratio(self, method, over):
        """Median over the rounds of one method's time over another's."""
        pairs = zip(self.seconds[method], self.seconds[over], strict=True)
        return statistics.median(a / b for a, b in pairs)


def quantiles(values):
    """(20 %, 50 %, 80 %) of a list."""
    ordered = sorted(values)
    return tuple(ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))


def time_cpu(calls, seconds=2.0, rounds=(7, 60)):
    """Time {method: callable} for `seconds` each; a sample is so many calls that it takes about a millisecond.

    A sample during which the process lost a core (ru_nivcsw rose) is thrown away, counted and taken again, until the
    time is over: a call of half a second is hardly ever undisturbed, and then stays as it is.
    """
    repeats = _repeats(calls)
    timing = Timing({m: [] for m in calls}, repeats, dict.fromkeys(calls, 0))
    order, shuffle = list(calls), random.Random(0).shuffle
    end = time.perf_counter() + seconds * len(calls)
    while len(timing.seconds[order[0]]) < rounds[1]:
        shuffle(order)
        for method in order:
            timing.seconds[method].append(_clean_sample(calls[method], repeats, end, method, timing) / repeats)
        if time.perf_counter() > end and len(timing.seconds[order[0]]) >= rounds[0]:
            break
    return timing


def _repeats(calls):
    fastest = SAMPLE_SECONDS
    for call in calls.values():
        # the first call warms up; a long one needs no second opinion
        tries = 0 if _sample(call, 1)[0] > 50 * SAMPLE_SECONDS else 4
        fastest = min([fastest, *(_sample(call, 1)[0] for _ in range(tries))])
    return max(1, min(200, round(SAMPLE_SECONDS / fastest)))


def _clean_sample(call, repeats, end, method, timing):
    # a method finds the caches as its own previous call would leave them
    if repeats > 1:
        call()
    while True:
        seconds, disturbed = _sample(call, repeats)
        if not disturbed or time.perf_counter() > end:
            return seconds
        timing.dropped[method] += 1


def _sample(call, repeats):
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw > switches


def time_cuda(calls, copies, rounds=30, graphs=True):
    """As time_cpu, of CUDA graphs: {method: callable that runs the layer once on each of `copies` sets of weights}."""
    runs = {method: _capture(call).replay if graphs else call for method, call in calls.items()}
    timing = Timing({m: [] for m in calls}, copies, dict.fromkeys(calls, 0))
    order, shuffle = list(calls), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for method in order:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            runs[method]()
            start.record()
            runs[method]()
            end.record()
            end.synchronize()
            timing.seconds[method].append(start.elapsed_time(end) / 1e3 / copies)
    return timing


def _capture(call):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@contextlib.contextmanager
def _quiet_stderr():
    """The profiler writes two lines to the file descriptor each time that it starts and stops."""
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


def peak_bytes(call, device):
    """Most bytes that one call holds at a time beyond what was there before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
