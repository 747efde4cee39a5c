"""Many adapters, one base model, on the routed op; and a server.

`attach` gives a model an `AdapterPool`; then `model.generate(..., adapters=["fr", None, {"a": 0.6, "b": 0.4}])`, and
`with adapters(model, [...])` for a bare forward and for training. `engine` drives transformers' continuous batching
with adapters for each request, `server` is the HTTP interface, `run` the command. Installed as fastlora.serve.
"""

from fastlora.serve.attach import adapters, attach, detach
from fastlora.serve.pool import AdapterPool, Lease, PoolFull

__all__ = ["AdapterPool", "Lease", "PoolFull", "adapters", "attach", "detach"]
