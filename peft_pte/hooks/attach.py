"""Installs the hooks on a Hugging Face model, and takes them off again.

Where PTE meets the model: on the model itself, since several callers go around the tuner.

(H1) hooks on the top model find the prompt border in `prompt_lengths`, `labels` or `logits_to_keep` (border.py);
(H2) a wrapper of the decoder's forward adopts the cache, evicts, splits long inputs, runs the replay (decoder.py);
(H3) hooks on each attention module hand the state to its projections and take it back (attention.py);
(H4) a wrapper of `generate` refuses what cannot work and makes the prompt length known (generation.py).

Nothing is kept between calls except in the cache.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from ..compiling import decides
from ..encoder import ENCODER_NAME, ThoughtEncoder
from .attachment import Attachment
from .attention import hand_over_state, take_state_back
from .border import find_border, forget_border
from .decoder import around_decoder
from .generation import GENERATION_METHODS

MODEL_TAGS = ["pte", "peft_pte"]


def wrap(module: nn.Module, name: str, around: Callable[..., Any]) -> None:
    """Put `around(module, original, *args, **kwargs)` in front of `module.<name>`, for this instance only.

    A wrapper that was there before (accelerate's, say) is kept as an attribute, so that a deepcopy rebinds it.
    """
    setattr(module, f"pte_original_{name}", module.__dict__.get(name))

    @decides
    @functools.wraps(getattr(type(module), name))
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        original = self.__dict__.get(f"pte_original_{name}") or functools.partial(getattr(type(self), name), self)
        return around(self, original, *args, **kwargs)

    setattr(module, f"pte_wrapper_{name}", wrapper)
    setattr(module, name, types.MethodType(wrapper, module))


def unwrap(module: nn.Module, name: str) -> None:
    """Take the wrapper off again. If somebody has wrapped it since, it stays, and passes everything through."""
    wrapper = module.__dict__.get(f"pte_wrapper_{name}")
    if wrapper is None or getattr(module.__dict__.get(name), "__func__", None) is not wrapper:
        return
    del module.__dict__[f"pte_wrapper_{name}"]
    original = module.__dict__.pop(f"pte_original_{name}")
    if original is None:
        delattr(module, name)
    else:
        setattr(module, name, original)


def attach(top: nn.Module, decoder: nn.Module) -> Attachment:
    """Install H1, H2 and H4 (H3 comes with each encoder), once for all adapters of a model."""
    attachment = Attachment(top, decoder)
    attachment.handles = [
        top.register_forward_pre_hook(find_border, with_kwargs=True),
        top.register_forward_hook(forget_border, always_call=True),
    ]
    top.pte_attachment = decoder.pte_attachment = attachment
    if hasattr(top, "add_model_tags"):  # for the model card
        top.add_model_tags(MODEL_TAGS)
    wrap(decoder, "forward", around_decoder)
    for name, around in GENERATION_METHODS.items():
        if hasattr(top, name):
            wrap(top, name, around)
    return attachment


def attach_encoder(attachment: Attachment, attention: nn.Module, encoder: ThoughtEncoder) -> None:
    """Put an encoder into its attention module, with H3."""
    attention.add_module(ENCODER_NAME, encoder)
    attachment.encoders.append(encoder)
    attachment.handles += [
        attention.register_forward_pre_hook(hand_over_state, with_kwargs=True),
        attention.register_forward_hook(take_state_back, always_call=True),
    ]


def detach(attachment: Attachment) -> None:
    """Remove everything that `attach` and `attach_encoder` installed."""
    decoder = attachment.decoder
    for handle in attachment.handles:
        handle.remove()
    for module in decoder.modules():
        if ENCODER_NAME in module._modules:
            delattr(module, ENCODER_NAME)
    unwrap(decoder, "forward")
    for name in GENERATION_METHODS:
        unwrap(attachment.top, name)
    for module in {attachment.top, decoder}:
        del module.pte_attachment
    if hasattr(attachment.top, "add_model_tags"):
        attachment.top.model_tags = [tag for tag in attachment.top.model_tags if tag not in MODEL_TAGS]
        if not attachment.top.model_tags:
            del attachment.top.model_tags  # the class has the default
