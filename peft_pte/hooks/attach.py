"""Installs the hooks on a Hugging Face model, and takes them off again.

Where PTE meets the model: on the model itself, since several callers go around the tuner.

(H1) hooks on the top model find the prompt border in `prompt_lengths`, `labels` or `logits_to_keep` (border.py);
(H2) a wrapper of the decoder's forward adopts the cache, evicts, splits long inputs, runs the replay (decoder.py);
(H3) hooks on each attention module hand the state to its projections and take it back (attention.py);
(H4) a wrapper of `generate` refuses what cannot work and makes the prompt known (generation.py).

Nothing is kept between calls except in the cache, and the state of a call lives in the call: in arguments, or in
context variables, which every thread has for itself.
"""

from __future__ import annotations

from torch import nn

from ..encoder import ENCODER_NAME, ThoughtEncoder
from ..replay.checkpointing import restore_checkpointing_flags
from .attachment import Attachment, unwrap, wrap
from .attention import hand_over_state, take_state_back
from .border import find_border, forget_border
from .decoder import around_decoder
from .generation import GENERATION_METHODS

MODEL_TAGS = ["pte", "peft_pte"]


def attach(top: nn.Module, decoder: nn.Module) -> Attachment:
    """Install H1, H2 and H4 (H3 comes with each encoder), once for all adapters of a model."""
    attachment = Attachment(top, decoder)
    attachment.handles = [
        top.register_forward_pre_hook(find_border, with_kwargs=True),
        top.register_forward_hook(forget_border, always_call=True),
    ]
    top.pte_attachment = decoder.pte_attachment = attachment
    if hasattr(type(top), "add_model_tags"):  # for the model card
        top.add_model_tags(MODEL_TAGS)
    wrap(decoder, "forward", around_decoder, attachment)
    for name, around in GENERATION_METHODS.items():
        if hasattr(type(top), name):
            wrap(top, name, around, attachment)
    return attachment


def attach_encoder(attachment: Attachment, attention: nn.Module, encoder: ThoughtEncoder) -> None:
    """Put an encoder into its attention module, with H3."""
    attention.add_module(ENCODER_NAME, encoder)
    attachment.encoders.append(encoder)
    attachment.handles += [
        attention.register_forward_pre_hook(hand_over_state, with_kwargs=True),
        attention.register_forward_hook(take_state_back),
    ]


def detach(attachment: Attachment) -> None:
    """Remove everything that `attach` and `attach_encoder` installed."""
    top, decoder = attachment.top, attachment.decoder
    for handle in attachment.handles:
        handle.remove()
    for module in decoder.modules():
        if ENCODER_NAME in module._modules:
            delattr(module, ENCODER_NAME)
    restore_checkpointing_flags(decoder)
    unwrap(decoder, "forward", attachment)
    for name in GENERATION_METHODS:
        unwrap(top, name, attachment)
    for module in {top, decoder}:
        del module.pte_attachment
    if hasattr(type(top), "add_model_tags"):
        top.model_tags = [tag for tag in top.model_tags if tag not in MODEL_TAGS]
        if not top.model_tags:
            del top.model_tags  # the class has the default
