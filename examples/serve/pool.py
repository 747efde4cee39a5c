"""Adapters that come and go while a model runs: pages of rank rows, counted leases, the least recently used leaves."""

import itertools
import math
import threading

import torch

from fastlora.nn.convert import kind_of
from fastlora.nn.linear import DenseLoRA
from fastlora.nn.switch import selected
from fastlora.ops import check
from fastlora.serve.held import Held, Lease, PoolFull, Trained
from fastlora.serve.pages import ROWS, Arena, pages_of
from fastlora.serve.read import read

# a pool of so many adapters has room for them at this rank, on every layer
USUAL_RANK = 16


class AdapterPool:
    """Adapters by name for the dense linear layers of a model, on its device in pages of 8 rank rows.

    An adapter of rank r takes ⌈r / 8⌉ pages of each layer that it adapts, one more for DoRA. `adapters` makes room for
    that many of rank 16 on every layer, `bytes` for as many as fit. Loaded adapters stay on the host; pages of idle
    ones are reused, the least recently used first. Thread-safe; `attach` makes the model use it. Without it, one layer:
    `lora_routed(x, weight, pool.pages(layer), None, route)`, whose slots and gates are a lease's `entries`.
    Raises ValueError for a model without such layers and for sizes that hold nothing. Source: S-LoRA, arXiv 2311.03285.
    """

    def __init__(self, model, *, adapters=64, bytes=None, dtype=None, max_rank=256):
        check.value(max_rank >= 1, "max_rank", max_rank, "at least 1")
        self.layers = {n: m for n, m in model.named_modules() if kind_of(m) is DenseLoRA}
        check.value(self.layers, "model", f"a {type(model).__name__} without dense linear layers", "one with some")
        first = next(iter(self.layers.values())).weight
        self.model, self.device, self.dtype = model, first.device, dtype or first.dtype
        self.max_rank = -(-max_rank // ROWS) * ROWS
        page = sum(sum(layer.weight.shape) * ROWS * self.dtype.itemsize for layer in self.layers.values())
        count = adapters * -(-USUAL_RANK // ROWS) if bytes is None else bytes // page
        check.value(count >= 1, "bytes" if bytes else "adapters", bytes or adapters, f"room for a page, {page} bytes")
        self.page_count, self.slots, self.evictions = count, count, 0
        self.arenas = {n: Arena(m, count, count, self.max_rank, self.dtype) for n, m in self.layers.items()}
        self._free, self._names, self._own = list(range(count)), {}, 0
        self._lock, self._clock, self._generations = threading.RLock(), itertools.count(1), itertools.count(1)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def load(self, name, source, *, pin=False, unsafe=False):
        """Load an adapter from a folder in PEFT's format or tensors by name; `unsafe` also takes pickled .bin files.

        Raises ValueError, with the pool as it was, for a name that is taken or not allowed, a file that is damaged or
        of another model, NaN, a rank above max_rank, an adapter larger than the pool; with `pin`, PoolFull.
        """
        self._check_name(name)
        held = self._read(name, source, unsafe)
        with self._lock:
            self._check_name(name)
            if pin:
                self._place(held)
            held.pinned, self._names[name] = pin, held

    def replace(self, name, source, *, unsafe=False):
        """Load another adapter under a name that is in use: requests that run finish on the old one."""
        held = self._read(name, source, unsafe)
        with self._lock:
            old = self._get(name)
            check.value(old.trained is None, "name", f"{name!r}, which is being trained", "a loaded adapter")
            if old.pinned:
                # the old one may make room, where no request uses it
                old.pinned, held.pinned, old.used = False, True, 0
                try:
                    self._place(held)
                except PoolFull:
                    old.pinned = True
                    raise
            self._names[name] = held
            self._forget(old)

    def unload(self, name):
        """Forget a name at once; its pages are free when the last request that uses it ends."""
        with self._lock:
            self._forget(self._get(name))
            del self._names[name]

    def pin(self, name):
        """Bring an adapter to the device, and keep it there."""
        with self._lock:
            self._place(self._get(name))
            self._get(name).pinned = True

    def unpin(self, name):
        """Let an adapter's pages be reused when it is idle."""
        with self._lock:
            self._get(name).pinned = False

    def names(self):
        """The names that can be asked for, in the order of loading."""
        with self._lock:
            return list(self._names)

    def info(self):
        """{name: what it takes}: ranks, pages over all layers, place (device or host), pinned, leases, trained."""
        with self._lock:
            return {name: held.info() for name, held in self._names.items()}

    def pages(self, layer):
        """The `fastlora.Pages` of a layer, the same through all loading; trained adapters are not in them.

        Raises KeyError for the name of a layer that the pool does not route.
        """
        return self.arenas[layer].pages

    def used_pages(self):
        """How many pages are in use, over all layers."""
        with self._lock:
            return sum(self.page_count - len(arena.free) for arena in self.arenas.values())

    def nbytes(self):
        """Bytes of the pages in use."""
        with self._lock:
            return sum((self.page_count - len(arena.free)) * arena.page_bytes for arena in self.arenas.values())

    def acquire(self, spec):
        """A Lease on an adapter's name, {name: weight} of several, or None for the base alone.

        Raises KeyError for an unknown name, ValueError for a weight that is not finite, PoolFull.
        """
        given = {} if spec is None else spec if isinstance(spec, dict) else {spec: 1.0}
        for name, weight in given.items():
            check.value(math.isfinite(weight), f"the weight of {name!r}", weight, "a finite number")
        with self._lock:
            held = [self._get(name) for name in given]
            for one in held:
                one.leases += 1
            try:
                for one in held:
                    self._place(one)
            except PoolFull:
                for one in held:
                    one.leases -= 1
                raise
        for one in (one for one in held if one.ready is not None):
            torch.cuda.current_stream(self.device).wait_event(one.ready)
        return Lease(self, tuple(held), tuple(map(float, given.values())))

    def running(self, batch):
        """Context manager: this thread's forwards run this batch."""
        used = (slot for entries in batch.lists for slot, _ in entries)
        batch.pairs = frozenset(slot - self.slots for slot in used if slot >= self.slots)
        if self._stream and not torch.cuda.is_current_stream_capturing():
            # the thread that acquired may have waited for the copies in another stream
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        return selected(self, batch)

    def create(self, name, r, lora_alpha=None, target_modules=None):
        """A new adapter to train, lora_A drawn and lora_B zero, in float32; `target_modules` are ends of layers' names.

        `parameters(name)` are its own, and get gradients where a forward used it; it is pinned. Returns the parameters.
        """
        self._check_name(name)
        wanted = {n: m for n, m in self.layers.items()
                  if target_modules is None or any(f".{n}".endswith(f".{end}") for end in target_modules)}  # fmt: skip
        check.value(wanted, "target_modules", target_modules, "ends of the routed layers' names")
        trained = Trained(wanted, r, r if lora_alpha is None else lora_alpha)
        with self._lock:
            self._check_name(name)
            slot, self._own = self.slots + self._own, self._own + 1
            self._names[name] = Held(name, next(self._generations), {}, trained, slot, pinned=True)
            for layer, arena in self.arenas.items():
                arena.set_pair(slot - self.slots, trained.adapters.get(layer))
        return trained.parameters()

    def parameters(self, name):
        """The parameters of an adapter that `create` made."""
        return self._trained(name).parameters()

    def save(self, name, folder):
        """Write an adapter that `create` made in PEFT's folder format."""
        self._trained(name).save(self.model, folder)

    def _trained(self, name):
        trained = self._get(name).trained
        check.value(trained, "name", f"{name!r}, which was loaded", "an adapter made by create")
        return trained

    def _check_name(self, name):
        fits = isinstance(name, str) and name.strip() and not set(name) & set("*+:\0")
        check.value(fits, "name", repr(name), "a name without *, + and :")
        check.value(name not in self._names, "name", repr(name), "one that is not loaded yet")

    def _read(self, name, source, unsafe):
        pairs = read(self.model, self.layers, source, self.max_rank, self.dtype, unsafe)
        most, room = max(map(pages_of, pairs.values())), self.page_count
        check.value(most <= room, "source", f"{most} pages on a layer", f"at most the pool's {room}")
        if self._stream:
            pinned = {n: (p.lora_A.pin_memory(), p.lora_B.pin_memory()) for n, p in pairs.items()}
            pairs = {n: p._replace(lora_A=pinned[n][0], lora_B=pinned[n][1]) for n, p in pairs.items()}
        return Held(name, next(self._generations), pairs)

    def _get(self, name):
        held = self._names.get(name)
        if held is None:
            raise KeyError(f"fastlora: adapter: got {name!r}, expected one of {list(self._names)}")
        return held

    def _forget(self, held):
        held.gone = True
        if not held.leases:
            self._take_back(held)

    def _release(self, lease):
        with self._lock:
            if lease.released:
                return
            lease.released = True
            for held in lease.held:
                held.leases -= 1
                if held.gone and not held.leases:
                    self._take_back(held)

    def _take_back(self, held):
        if held.trained:
            # its number stays its own: routes in use name the others by theirs
            for arena in self.arenas.values():
                arena.set_pair(held.slot - self.slots, None)
        elif held.slot is not None:
            for name in held.pairs:
                self.arenas[name].clear(held.slot)
            self._free.append(held.slot)
        held.slot = None

    def _place(self, held):
        held.used = next(self._clock)
        if held.slot is not None:
            return
        need = {n: pages_of(pair) for n, pair in held.pairs.items()}
        free = {n: len(self.arenas[n].free) for n in need}
        slots, leaving = len(self._free), []
        idle = (h for h in self._names.values() if h.slot is not None and not (h.leases or h.pinned or h.trained))
        idle = iter(sorted(idle, key=lambda h: h.used))
        while not slots or any(free[n] < pages for n, pages in need.items()):
            last = next(idle, None)
            if last is None:
                raise PoolFull(f"fastlora: no room for adapter {held.name!r}: the others are pinned or in use")
            leaving.append(last)
            slots += 1
            for n in free.keys() & last.pairs:
                free[n] += pages_of(last.pairs[n])
        for last in leaving:
            self._take_back(last)
        self.evictions += len(leaving)
        held.slot = self._free.pop(0)
        with torch.cuda.stream(self._stream):
            if self._stream:
                self._stream.wait_stream(torch.cuda.current_stream(self.device))
            for name, pair in held.pairs.items():
                self.arenas[name].write(held.slot, *pair)
            held.ready = self._stream.record_event() if self._stream else None
