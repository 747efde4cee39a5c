"""Many adapters, one base model: a pool that they come to and leave, and batches in which every row has its own."""

from fastlora.serve.attach import adapters, attach, detach
from fastlora.serve.pool import AdapterPool, Lease, PoolFull

__all__ = ["AdapterPool", "Lease", "PoolFull", "adapters", "attach", "detach"]
