"""One adapter, several windows: calls under another cache policy than the configuration's.

What a call runs under is noted in a context variable, which every thread has for itself. It is read once a call, where
the policy of the active adapters is (attachment.py): a replay holds what it was told until its backward pass, and a
cache is bound to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

from torch import nn

from ..config import CachePolicy
from ..replay.heads import attachment_in


class Override(NamedTuple):
    """What is changed of the policies of one model's adapters; `attachment`: stands for the model."""

    attachment: Any
    changes: dict[str, Any]


# The `window` contexts that are open, the innermost last.
current_overrides: ContextVar[tuple[Override, ...]] = ContextVar("pte_windows", default=())


def in_effect(attachment: Any, policy: CachePolicy) -> CachePolicy:
    """The policy of an adapter in this context."""
    for override in current_overrides.get():
        if override.attachment is attachment:
            policy = policy._replace(**override.changes)
    return policy


@contextlib.contextmanager
def window(
    model: nn.Module,
    window_size: int | Literal["prompt"] | None = None,
    *,
    eviction_ratio: float | None = None,
    retained_prefix: int | Literal["prompt"] | None = None,
) -> Iterator[None]:
    """Run calls of the model under another window than its configuration's.

    Any call: a forward, a training step, `generate`, `sequence_logprobs`, the loss of a trainer. The result is that of
    a model whose `PTEConfig` has these values. A backward pass may come after the context has been left. The context
    holds for this model and all of its adapters, in the thread (or the asyncio task) that enters it: threads that are
    started inside begin with the configuration's window. Contexts may be nested; the inner one says what it names.

    A cache keeps the policy it was first used under, and is refused under any other.

    ```py
    with peft_pte.window(model, 768):
        model.generate(**inputs)
    ```

    Args:
        model: a model with a PTE adapter, wrapped (PEFT, DDP) or not.
        window_size: as the field of `PTEConfig`, as are the others; None: as it is.
        eviction_ratio: a float in (0, 1], or None.
        retained_prefix: a number of tokens, `"prompt"`, or None.

    Raises:
        ValueError: the model has no PTE adapter, nothing is changed, or a value is one that `PTEConfig` refuses.
    """
    attachment = attachment_in(model)
    given = dict(window_size=window_size, eviction_ratio=eviction_ratio, retained_prefix=retained_prefix)
    changes = {name: value for name, value in given.items() if value is not None}
    if not changes:
        raise ValueError(f"`window` was given nothing to change: pass one of {', '.join(map(repr, given))}.")
    overrides = (*current_overrides.get(), Override(attachment, changes))
    together = {name: value for o in overrides if o.attachment is attachment for name, value in o.changes.items()}
    for config in attachment.configs.values():
        config.check(**together)
    token = current_overrides.set(overrides)
    try:
        yield
    finally:
        current_overrides.reset(token)
