"""What a pool keeps of an adapter, and what a request holds while it needs one."""

from dataclasses import dataclass, field

from fastlora.serve.pages import pages_of
from fastlora.serve.trained import Trained


class PoolFull(RuntimeError):
    """Every adapter that could leave is in use; try again when a lease has been released."""


@dataclass(eq=False)
class Held:
    """One adapter as it was loaded: replaced, it is another one."""

    name: str
    generation: int
    pairs: dict
    trained: Trained | None = None
    slot: int | None = None
    leases: int = 0
    pinned: bool = False
    gone: bool = False
    used: int = 0
    ready: object = None

    def info(self):
        """What it takes: `pages` over all layers, `ranks` that occur, `place` "device" or "host", whether pinned, …"""
        if self.trained:
            ranks, pages = {adapter.r for adapter in self.trained.adapters.values()}, 0
        else:
            ranks, pages = {len(p.lora_A) for p in self.pairs.values()}, sum(map(pages_of, self.pairs.values()))
        place = "host" if self.slot is None else "device"
        return {"ranks": sorted(ranks), "pages": pages, "place": place, "pinned": self.pinned, "leases": self.leases,
                "trained": self.trained is not None}  # fmt: skip


@dataclass(eq=False)
class Lease:
    """A request's adapters, which stay as they are until `release`: `entries` of (slot, weight)."""

    pool: object
    held: tuple = ()
    weights: tuple = ()
    released: bool = field(default=False, repr=False)

    @property
    def entries(self):
        return tuple((held.slot, weight) for held, weight in zip(self.held, self.weights, strict=True))

    @property
    def key(self):
        """What keys and values computed under this lease depend on, besides the tokens."""
        return tuple((held.generation, weight) for held, weight in zip(self.held, self.weights, strict=True))

    def release(self):
        self.pool._release(self)
