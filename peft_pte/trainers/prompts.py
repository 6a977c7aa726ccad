"""Where prompts end, for trainers that take the labels out of the batch before they call the model.

`compute_metrics`, `label_smoothing_factor` and `compute_loss_func` do that in `Trainer` and `SFTTrainer`; reward and
some distillation trainers have none. The border between prompt and thoughts is then known from the batch only:

    class MyTrainer(KnownPrompts, SFTTrainer): ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from ..hooks.border import batch_known
from ..replay.heads import first_labels
from .checkpoints import TrainerBase, refuse_order


def shared_prefix(input_ids: torch.Tensor) -> torch.Tensor:
    """The number of columns [2 B] that each row of a batch of pairs [2 B, T] has in common with its partner.

    The first half of the rows are the chosen answers, the second half the rejected ones, aligned at their beginning, as
    `RewardTrainer` makes them.
    """
    chosen, rejected = input_ids.chunk(2)
    shared = (chosen == rejected).long().cumprod(-1).sum(-1)
    return torch.cat([shared, shared])


class KnownPrompts(TrainerBase):
    """Mixin for a `Trainer` of any kind, named before it among the base classes.

    While the loss of a batch is computed, calls of the model on the tokens of this batch know where the prompts end.
    Override `prompt_lengths` if the batch says so in another way.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_order(cls, KnownPrompts)

    def prompt_lengths(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """The column [B] of each row of `inputs["input_ids"]` [B, T] at which its completion begins, padding counted.

        From `prompt_lengths`, `labels` (the first one that is not -100) or `completion_mask`, whichever is there; in a
        `RewardTrainer`, what the two answers of a pair have in common is their prompt. None if nothing says so.
        """
        ids, given = inputs["input_ids"], inputs.get("prompt_lengths")
        if given is not None:
            return torch.as_tensor(given)
        labels, completion = inputs.get("labels"), inputs.get("completion_mask")
        if isinstance(labels, torch.Tensor) and labels.shape == ids.shape:
            return first_labels(labels)
        if isinstance(completion, torch.Tensor) and completion.shape == ids.shape:
            return first_labels(torch.where(completion.bool(), 0, -100))
        if any(base.__name__ == "RewardTrainer" for base in type(self).__mro__):
            return shared_prefix(ids)
        return None

    def _batch_known(self, inputs: Any) -> contextlib.AbstractContextManager[None]:
        if not isinstance(inputs, Mapping) or not isinstance(inputs.get("input_ids"), torch.Tensor):
            return contextlib.nullcontext()
        lengths = self.prompt_lengths(inputs)
        return contextlib.nullcontext() if lengths is None else batch_known(inputs["input_ids"], lengths)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with self._batch_known(inputs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with self._batch_known(inputs):
            return super().prediction_step(model, inputs, *args, **kwargs)
