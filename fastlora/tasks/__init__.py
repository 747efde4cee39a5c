"""Named tasks: many adapters on one model, TheDiscoMole/LoRA's interface, with simultaneous tasks."""

from fastlora.tasks import adapters
from fastlora.tasks.adapters import *  # noqa: F403
from fastlora.tasks.model import Model

__all__ = ["Model"]
__all__ += adapters.__all__
