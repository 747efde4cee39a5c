"""Continuous batching with an adapter per request: transformers schedules and pages, this gives each token its route.

The one file that touches transformers' private names; `SUPPORTED` says of which versions. Four of its methods are
wrapped on the objects themselves: where a step is packed (the route is built from the same requests in the same
order), where it runs, where it samples, and where blocks of keys and values are looked up and kept by their content
(another adapter's blocks are other blocks).
"""

import hashlib
import itertools
import threading
from collections import deque

import torch
import transformers
from packaging.version import Version
from transformers import ContinuousBatchingConfig, GenerationConfig

from fastlora.serve.batch import Packed
from fastlora.serve.pool import PoolFull
from fastlora.serve.sampling import Sampler

SUPPORTED = ("5.20", "5.25")


class Stopped(RuntimeError):
    """The engine takes no requests: it is stopping, or its thread has died."""


class Full(RuntimeError):
    """As many requests as are allowed run and wait."""


class Request:
    """One prompt on its way. `on_token(token, finish)` is called in the engine's thread for each new token, `finish`
    being None, "stop", "length" or an exception; after that it is called no more."""

    def __init__(self, number, input_ids, spec, max_new_tokens, sampler, eos, on_token):
        self.id, self.input_ids, self.spec = f"fastlora-{number}", input_ids, spec
        self.max_new_tokens, self.sampler, self.eos, self.on_token = max_new_tokens, sampler, eos, on_token
        self.lease, self.seen, self.cancelled = None, 0, False


class Engine:
    """Serves `model`, whose layers `attach` has given `pool`, from a thread of its own.

    `cache_tokens` is the size of the cache of keys and values, `batch_tokens` the most tokens in a step, `page` the
    tokens of a block, `most` the requests that may run and wait at once. A request keeps its adapters from the moment
    that the pool has room for them until it ends, fails or is cancelled; until then it waits here.
    """

    def __init__(self, model, pool, *, cache_tokens=8192, batch_tokens=256, page=32, most=256, prefix_sharing=True):
        version = Version(transformers.__version__)
        if not Version(SUPPORTED[0]) <= version < Version(SUPPORTED[1]):
            raise RuntimeError(f"fastlora serves with transformers >={SUPPORTED[0]},<{SUPPORTED[1]}, not {version}")
        if getattr(model, "_device_mesh", None) is not None:
            raise RuntimeError("fastlora serves no tensor parallel models: other ranks would not know the adapters")
        self.model, self.pool, self.most = model, pool, most
        eos = model.generation_config.eos_token_id
        self.eos = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", cache_tokens)
        self.longest = min(positions, cache_tokens - page)
        self._requests, self._waiting, self._numbers = {}, deque(), itertools.count()
        self._lock, self._idle, self._closing = threading.RLock(), threading.Event(), False
        self._idle.set()
        config = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=-(-cache_tokens // page),
            max_batch_tokens=batch_tokens,
            max_requests_per_batch=batch_tokens,
            allow_block_sharing=prefix_sharing,
            use_async_batching=False,
            use_cuda_graph=False,
        )
        generation = GenerationConfig(do_sample=False, eos_token_id=list(self.eos) or -1)
        self._manager = model.init_continuous_batching(generation, config)
        self._create, self._manager._create_batch_processor = self._manager._create_batch_processor, self._processor
        router = self._manager.output_router
        router.deliver, router.deliver_batch = self._deliver, lambda outputs: [self._deliver(o) for o in outputs]
        self._manager.start()

    @property
    def alive(self):
        return not self._closing and self._manager.is_running()

    def counts(self):
        """(requests that run, requests that wait for room in the pool)"""
        return len(self._requests) - len(self._waiting), len(self._waiting)

    def submit(self, input_ids, spec, on_token, *, max_new_tokens, ignore_eos=False, **sampling):
        """Queue a prompt for None, an adapter's name or {name: weight}; returns its Request.

        Sampling: temperature (0: the likeliest token), top_p, top_k, seed. Raises KeyError for an unknown adapter,
        ValueError for a prompt that has no room, Full, Stopped.
        """
        if not input_ids or len(input_ids) + max_new_tokens > self.longest:
            raise ValueError(f"{len(input_ids)} prompt tokens and {max_new_tokens} new ones: 1 to {self.longest} in all")
        sampler = Sampler(self.model.device, **sampling)
        eos = () if ignore_eos else self.eos
        request = Request(next(self._numbers), list(input_ids), spec, max_new_tokens, sampler, eos, on_token)
        with self._lock:
            if not self.alive:
                raise Stopped("the engine is stopping or has died")
            if len(self._requests) >= self.most:
                raise Full(f"{self.most} requests run and wait already")
            self._requests[request.id] = request
            self._idle.clear()
            self._waiting.append(request)
            try:
                self._admit(request)
            except BaseException:
                self._forget(request)
                raise
        return request

    def cancel(self, request):
        """Stop a request; its adapters are free once the running step is over."""
        with self._lock:
            request.cancelled = True
            if request in self._waiting:
                self._forget(request)
            elif request.id in self._requests:
                self._manager.cancel_request(request.id)

    def stop(self, timeout=None):
        """Take no more requests, finish those there are (for at most `timeout` seconds), end the thread."""
        with self._lock:
            self._closing = True
        finished = self._idle.wait(timeout if self._manager.is_running() else 0)
        self._manager.stop(hard_stop=not finished)

    def _admit(self, newest=None):
        """Give the waiting their adapters, in order; who needs none passes. `newest`'s errors are its caller's."""
        full = False
        for request in list(self._waiting):
            if full and request.spec is not None:
                continue
            try:
                request.lease = self.pool.acquire(request.spec)
                self._start(request)
                self._waiting.remove(request)
            except (PoolFull, KeyError, ValueError, Stopped) as error:
                # without a request that runs, no room will ever come free
                full = isinstance(error, PoolFull) and self.counts()[0] > 0
                if full:
                    continue
                if request is newest:
                    raise
                self._forget(request)
                request.on_token(None, error)

    def _start(self, request):
        limits = {"max_new_tokens": request.max_new_tokens, "eos_token_id": list(request.eos)}
        if self._manager.add_request(request.input_ids, request.id, streaming=True, **limits) is None:
            raise Stopped("the engine is stopping or has died")

    def _forget(self, request):
        with self._lock:
            self._requests.pop(request.id, None)
            if request in self._waiting:
                self._waiting.remove(request)
            if request.lease is not None:
                request.lease.release()
            if not self._requests:
                self._idle.set()

    def _deliver(self, output):
        """A step's outcome for a request, in the manager's thread."""
        request = self._requests.get(output.request_id)
        if request is None:
            return
        new, request.seen = output.generated_tokens[request.seen :], len(output.generated_tokens)
        finish = None
        if output.error is not None:
            finish = Stopped(output.error)
        elif output.is_finished():
            finish = "stop" if output.generated_tokens[-1] in request.eos else "length"
        if finish is not None:
            self._forget(request)
        if not request.cancelled:
            for token in new[:-1]:
                request.on_token(token, None)
            request.on_token(new[-1] if new else None, finish)
        if finish is not None:
            with self._lock:
                self._admit()

    # in the manager's thread

    def _processor(self):
        processor = self._create()
        io, runner, scheduler = processor.inputs_and_outputs, processor.model_runner, processor.scheduler
        pack, step, clear = io.prepare_batch_tensors, processor._generation_step, scheduler.clear_cancelled_requests
        now = []

        def prepare_batch_tensors(requests_in_batch, *args, **kwargs):
            states = list(requests_in_batch)
            pack(requests_in_batch, *args, **kwargs)
            requests = [self._requests[future.state.request_id] for future in states]
            rows = [i for i, future in enumerate(states) for _ in range(future.query_length)]
            rows += [-1] * (io.num_q_tokens - len(rows))
            ends = itertools.accumulate(future.query_length for future in states)
            kept = [end - 1 for end, future in zip(ends, states, strict=True) if future.has_new_token]
            kept += [0] * (len(states) - len(kept))
            packed = Packed([request.lease.entries for request in requests], rows, self.model.device, kept)
            drawn = [request.sampler for request, future in zip(requests, states, strict=True) if future.has_new_token]
            now[:] = packed, drawn

        def generation_step(model):
            with self.pool.running(now[0]):
                step(model)

        def sample(scores, output_ids):
            tokens = scores[0].argmax(-1)
            for i, sampler in enumerate(now[1]):
                if not sampler.greedy:
                    tokens[i] = sampler.draw(scores[0, i])
            output_ids[0, : len(tokens)].copy_(tokens)

        def clear_cancelled_requests():
            states = clear()
            # no step runs now that could still read their adapters
            for state in states:
                self._forget(self._requests[state.request_id])
            if states:
                with self._lock:
                    self._admit()
            return states

        io.prepare_batch_tensors, processor._generation_step = prepare_batch_tensors, generation_step
        runner._sample, scheduler.clear_cancelled_requests = sample, clear_cancelled_requests
        self._seed_prefixes(processor.cache)
        return processor

    def _seed_prefixes(self, cache):
        """Blocks are found by a hash of their tokens: here also of what the request's adapters do to them."""

        def seeded(request_id, tokens):
            key = self._requests[request_id].lease.key if request_id in self._requests else None
            if not key:
                return tokens
            digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
            salts = [int.from_bytes(digest[i : i + 4], "little") >> 1 for i in range(0, 16, 4)]
            return [token ^ salt for token, salt in zip(tokens, salts, strict=False)] + list(tokens[4:])

        def wrap(allocator, mark):
            allocator.mark_complete_blocks = lambda name, tokens, count: mark(name, seeded(name, tokens), count)

        search = cache.search_prefix_match
        cache.search_prefix_match = lambda request_id, prompt: search(request_id, seeded(request_id, prompt))
        for allocator in cache.cache_allocators.values():
            wrap(allocator, allocator.mark_complete_blocks)
