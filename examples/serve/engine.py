"""Continuous batching with adapters per request: transformers schedules and pages, this gives each token its route.

The one file that touches transformers' private names, of the versions in SUPPORTED. It wraps, on the objects, where a
step is packed, runs and samples, and where blocks of keys and values are looked up: another adapter's are others.
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
from fastlora.serve.sample import Draws

SUPPORTED = ("5.20", "5.25")


class Stopped(RuntimeError):
    """The engine takes no requests: it is stopping, or its thread has died."""


class Request:
    """One prompt on its way; `draw` is its Draws."""

    def __init__(self, name, spec, on_token, settings, draw):
        self.id, self.spec, self.on_token, self.settings, self.draw = name, spec, on_token, settings, draw
        self.adapters = () if spec is None else tuple(spec) if isinstance(spec, dict) else (spec,)
        self.lease, self.seen, self.cancelled, self.logprobs = None, 0, False, deque()


class Engine:
    """Serves `model`, whose layers `attach` has given `pool`, from a thread of its own.

    The cache of keys and values holds `cache_tokens` in blocks of `page`, a step `batch_tokens`; `most` requests run
    and wait. A request waits until the pool has room for its adapters, and keeps them until it ends or is cancelled.
    Raises RuntimeError for a transformers outside SUPPORTED and for a tensor parallel model.
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
        self.longest, self.vocabulary = min(positions, cache_tokens - page), model.config.get_text_config().vocab_size
        self._requests, self._waiting, self._numbers = {}, deque(), itertools.count()
        self._lock, self._idle, self._closing = threading.RLock(), threading.Event(), False
        self._idle.set()
        sizes = {"page_size": page, "num_blocks": -(-cache_tokens // page), "max_batch_tokens": batch_tokens}
        # a graph would replay the routes of the step that it was captured from
        ways = {"allow_block_sharing": prefix_sharing, "use_async_batching": False, "use_cuda_graph": False}
        config = ContinuousBatchingConfig(max_requests_per_batch=batch_tokens, **sizes, **ways)
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

    def adapters(self):
        """[names of the adapters of the requests that run, of those of the requests that wait], sorted."""
        with self._lock:
            groups = [request for request in self._requests.values() if request.lease], self._waiting
            return [sorted({name for request in group for name in request.adapters}) for group in groups]

    def submit(self, input_ids, spec, on_token, **options):
        """Queue a prompt for None, an adapter's name or {name: weight}; returns its Request.

        Options: max_new_tokens, ignore_eos, seed, those of `Draws`. The engine's thread calls `on_token(token, finish)`
        for each new token, with `logprobs` also their values and tokens; finish is None, in the end "stop", "length" or
        an exception. Raises KeyError for an unknown adapter, ValueError for a token that the model does not know and a
        prompt without room, Stopped, PoolFull also where `most` run and wait.
        """
        return self.submit_all([(input_ids, spec, on_token, options)])[0]

    def submit_all(self, calls):
        """`submit` for each (input_ids, spec, on_token, options), or for none of them where one is refused."""
        requests = [self._request(*call[:3], **call[3]) for call in calls]
        with self._lock:
            if not self.alive:
                raise Stopped("the engine is stopping or has died")
            if len(self._requests) + len(requests) > self.most:
                raise PoolFull(f"{len(self._requests)} requests run and wait already, of {self.most} at most")
            self._requests |= {request.id: request for request in requests}
            self._idle.clear()
            self._waiting += requests
            try:
                self._admit(requests)
            except Exception:
                for request in requests:
                    self.cancel(request)
                raise
        return requests

    def _request(self, ids, spec, on_token, *, max_new_tokens, ignore_eos=False, seed=None, **sampling):
        if not ids or len(ids) + max_new_tokens > self.longest:
            raise ValueError(f"{len(ids)} prompt tokens and {max_new_tokens} new ones: room for {self.longest}")
        if (token := max([*ids, *(sampling.get("logit_bias") or ())])) >= self.vocabulary:
            raise ValueError(f"token {token}, expected below {self.vocabulary}")
        generator = torch.Generator(self.model.device)
        generator.seed() if seed is None else generator.manual_seed(seed)
        settings = {"input_ids": list(ids), "max_new_tokens": max_new_tokens}
        settings["eos_token_id"] = [] if ignore_eos else list(self.eos)
        name, draws = f"fastlora-{next(self._numbers)}", Draws(ids, generator, **sampling)
        return Request(name, spec, on_token, settings, draws)

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
        if self._manager.is_running():
            self._manager.stop(hard_stop=not self._idle.wait(timeout))

    def _admit(self, newest=()):
        """Give the waiting their adapters, in order; who needs none passes. The caller gets errors of the `newest`."""
        with self._lock:
            for request in [r for r in self._waiting if r.spec is None] + [r for r in self._waiting if r.spec]:
                try:
                    request.lease = self.pool.acquire(request.spec)
                    if self._manager.add_request(request_id=request.id, streaming=True, **request.settings) is None:
                        raise Stopped("the engine is stopping or has died")
                    self._waiting.remove(request)
                except (PoolFull, KeyError, ValueError, Stopped) as error:
                    # without a request that runs no room will ever come free
                    if isinstance(error, PoolFull) and self.counts()[0]:
                        return
                    self._forget(request)
                    if request in newest:
                        raise
                    request.on_token(None, error)

    def _forget(self, request):
        with self._lock:
            self._requests.pop(request.id, None)
            if request in self._waiting:
                self._waiting.remove(request)
            if request.lease is not None:
                request.lease.release()
            if not self._requests:
                self._idle.set()

    # in the manager's thread

    def _deliver(self, output):
        request = self._requests.get(output.request_id)
        if request is None:
            return
        new, request.seen, finish = output.generated_tokens[request.seen :], len(output.generated_tokens), None
        if output.error is not None:
            finish = Stopped(output.error)
        elif output.is_finished():
            finish = "stop" if output.generated_tokens[-1] in request.settings["eos_token_id"] else "length"
        if finish is not None:
            self._forget(request)
        for token in [] if request.cancelled else new or [None]:
            logprobs = [part.tolist() for part in request.logprobs.popleft()] if request.logprobs else ()
            new = new[1:]
            request.on_token(token, None if new else finish, *logprobs)
        if finish is not None:
            self._admit()

    def _processor(self):
        processor, now = self._create(), []
        io, scheduler = processor.inputs_and_outputs, processor.scheduler
        pack, step, clear = io.prepare_batch_tensors, processor._generation_step, scheduler.clear_cancelled_requests

        def prepare_batch_tensors(requests_in_batch, *args, **kwargs):
            pack(requests_in_batch, *args, **kwargs)
            requests = [self._requests[future.state.request_id] for future in requests_in_batch]
            lengths = [future.query_length for future in requests_in_batch]
            rows = [i for i, length in enumerate(lengths) for _ in range(length)]
            rows += [-1] * (io.num_q_tokens - len(rows))
            ends = zip(itertools.accumulate(lengths), requests_in_batch, requests, strict=True)
            drawn = [(end - 1, request) for end, future, request in ends if future.has_new_token]
            # as many as there are requests: the manager's own indices end in zeros where a prompt was cut
            kept = [end for end, _ in drawn] + [0] * (len(requests) - len(drawn))
            packed = Packed([request.lease.entries for request in requests], rows, self.model.device, kept)
            now[:] = packed, [request for _, request in drawn]

        def generation_step(model):
            with self.pool.running(now[0]):
                step(model)

        def sample(scores, output_ids):
            for i, request in enumerate(now[1]):
                output_ids[0, i], logprobs = request.draw(scores[0, i])
                if logprobs is not None:
                    request.logprobs.append(logprobs)

        def clear_cancelled_requests():
            # some cancellations were read before their requests were
            for name in [request.id for request in list(self._requests.values()) if request.cancelled]:
                if name in scheduler.active_requests or name in scheduler.waiting_requests:
                    scheduler.set_request_cancellation(name)
            states = clear()
            # no step runs now that could still read their adapters
            for state in states:
                self._forget(self._requests[state.request_id])
            if states:
                # else who was put back for want of blocks would wait for a request that ends by itself
                scheduler.block_new_requests = False
                self._admit()
            return states

        io.prepare_batch_tensors, processor._generation_step = prepare_batch_tensors, generation_step
        processor.model_runner._sample, scheduler.clear_cancelled_requests = sample, clear_cancelled_requests
        self._seed_prefixes(processor.cache)
        return processor

    def _seed_prefixes(self, cache):
        """Blocks are found by a hash of their tokens; here the first of a prompt stand also for its lease's key."""

        def seeded(request_id, tokens):
            key = self._requests[request_id].lease.key
            digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
            salts = [int.from_bytes(digest[i : i + 4], "little") >> 1 for i in range(0, 16, 4)]
            return [token ^ salt for token, salt in zip(tokens, salts, strict=False)] + list(tokens[4:])

        def wrap(owner, name):
            method = getattr(owner, name)
            setattr(owner, name, lambda request, tokens, *rest: method(request, seeded(request, tokens), *rest))

        wrap(cache, "search_prefix_match")
        for allocator in cache.cache_allocators.values():
            wrap(allocator, "mark_complete_blocks")
