"""A module around a model that answers in its place what a Trainer or a user asks of it."""

import inspect

from torch import nn

from fastlora.nn.switch import checkpoint_context
from fastlora.ops import check


class Owner:
    """The key under which a thread's choice of adapters is kept; a copy of a model has its own."""


class Wrapper(nn.Module):
    """Holds `model`, and has its attributes."""

    def __getattr__(self, name):
        # what a Trainer asks of a model: config, device, generate
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    @property
    def accepts_loss_kwargs(self):
        """What a Trainer asks before it passes num_items_in_batch: whether the wrapped model takes any keyword."""
        kinds = [parameter.kind for parameter in inspect.signature(self.model.forward).parameters.values()]
        return getattr(self.model, "accepts_loss_kwargs", inspect.Parameter.VAR_KEYWORD in kinds)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **options):
        """transformers' method, with `context_fn=fastlora.checkpoint_context`: a recompute runs the same adapters."""
        given = {"use_reentrant": False, "context_fn": checkpoint_context, **(gradient_checkpointing_kwargs or {})}
        check.value(not given["use_reentrant"], "use_reentrant", given["use_reentrant"],
                    "False: a reentrant recompute cannot know the adapters")  # fmt: skip
        name = "activation" if hasattr(self.model, "activation_checkpointing_enable") else "gradient"
        enable = getattr(self.model, f"{name}_checkpointing_enable")
        enable(**{f"{name}_checkpointing_kwargs": given}, **options)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **options):
        """The same, by its name from transformers 5.24 on."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)
