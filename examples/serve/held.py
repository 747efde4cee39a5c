"""What a pool keeps of an adapter, trained or not, and what a request holds while it needs some."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from fastlora.checkpoint.folder import write_adapter
from fastlora.nn.bank import TaskAdapter
from fastlora.nn.convert import dense_weight, kind_of
from fastlora.nn.layer import check_adapter, identity
from fastlora.serve.pages import pages_of


class Trained:
    """An adapter that owns its parameters: float32 lora_A (r, in) and lora_B (out, r) on each of {name: layer}."""

    def __init__(self, layers, r, lora_alpha):
        check_adapter(r, lora_alpha, 0.0, least=1)
        self.adapters, self.transposed = {}, {}
        for name, layer in layers.items():
            adapter, weight = TaskAdapter(), dense_weight(layer)
            out, inner = weight.shape
            adapter.attach_factors(((r, inner), (out, r)), r, lora_alpha, torch.float32, weight.device)
            kind_of(layer).init_adapter(layer, adapter.lora_A, adapter.lora_B)
            self.adapters[name], self.transposed[name] = adapter, weight is not layer.weight

    def parameters(self):
        return [p for adapter in self.adapters.values() for p in adapter.parameters()]

    def save(self, model, folder):
        described = {
            name: SimpleNamespace(kind="linear", r=a.r, lora_alpha=a.lora_alpha, lora_A=a.lora_A, lora_B=a.lora_B,
                                  lora_dropout=identity, fan_in_fan_out=self.transposed[name])
            for name, a in self.adapters.items()
        }  # fmt: skip
        write_adapter(model, described, folder)


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
        own = self.trained.adapters.values() if self.trained else ()
        ranks = {adapter.r for adapter in own} | {len(pair.lora_A) for pair in self.pairs.values()}
        place, pages = "host" if self.slot is None else "device", sum(map(pages_of, self.pairs.values()))
        said = {"ranks": sorted(ranks), "pages": pages, "place": place, "pinned": self.pinned, "leases": self.leases}
        return {**said, "trained": self.trained is not None}


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
