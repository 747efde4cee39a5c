"""Many adapters, one base model, on fastlora's routed op: an application of the library, with a server.

`attach` gives a model an `AdapterPool`; then `model.generate(..., adapters=["fr", None, {"a": 0.6, "b": 0.4}])`, and
`with adapters(model, [...])` for a bare forward and for training. `engine` drives transformers' continuous batching
with an adapter for each request, `server` is the HTTP interface, `run` the command of `python examples/serve.py`.
"""

from serving.attach import adapters, attach, detach
from serving.pool import AdapterPool, Lease, PoolFull

__all__ = ["AdapterPool", "Lease", "PoolFull", "adapters", "attach", "detach"]
