"""Changes of the default that were tried and are not in the package, each in force inside a `with` block.

Those of the design before it (variants.py) have no convolution and read the attention's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
from torch import nn

import peft_pte.encoder
import peft_pte.stacked
from peft_pte import PTEConfig
from peft_pte.encoder import Reading, StateRule, ThoughtEncoder, TokenTable
from peft_pte_kernels import reference
from peft_pte_kernels.reference import bound_rows, convolve, delta_update, in_front, unit_rows

Rows = torch.Tensor
Valid = torch.Tensor | None
GATE_START = 4.0  # sigmoid(4) = 0.98


@contextmanager
def after_update_layer(change: Callable[[ThoughtEncoder, str, PTEConfig], None]) -> Iterator[None]:
    """`change` a new adapter's encoder when it has its parameters."""
    update_layer = ThoughtEncoder.update_layer

    def changed(self: ThoughtEncoder, name: str, config: PTEConfig) -> None:
        update_layer(self, name, config)
        change(self, name, config)

    with patch.object(ThoughtEncoder, "update_layer", changed):
        yield


@contextmanager
def carrying(extra: Callable[[StateRule], int]) -> Iterator[None]:
    """Sequences carry some more rows."""
    usual = StateRule.num_carried.fget
    with patch.object(StateRule, "num_carried", property(lambda rule: usual(rule) + extra(rule))):
        yield


@contextmanager
def with_write(change: Callable[..., Rows]) -> Iterator[None]:
    """Another way to write: (carried rows, keys, values, valid, taps) -> carried rows; valid tokens are in front."""

    def write(
        update: str,
        core: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        valid: torch.Tensor | None,
        taps: torch.Tensor,
    ) -> Rows:
        if valid is not None:
            keys, values, valid = in_front(keys, values, valid.expand(len(core), -1))
        return change(core, keys, values, valid, taps)

    with patch.object(reference, "write", write):
        yield


@contextmanager
def with_neighbour_from_the_start(share: float = 1.0) -> Iterator[None]:
    """The convolution starts as the sum of a key and (a share of) the one before it, not as the key."""

    def neighbour(self: ThoughtEncoder, name: str, config: PTEConfig) -> None:
        nn.init.constant_(self.pte_key_conv[name].weight[0], share)

    with after_update_layer(neighbour):
        yield


@contextmanager
def with_convolved_values() -> Iterator[None]:
    """Values are convolved too, from the identity on. Their weights stand under those of the keys."""

    def widen(self: ThoughtEncoder, name: str, config: PTEConfig) -> None:
        table = TokenTable(2 * (config.num_convolved - 1), config.r)
        nn.init.zeros_(table.weight)
        self.pte_key_conv[name] = table.requires_grad_(self.pte_key[name].weight.requires_grad)

    def write(core: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, valid: Valid, taps: torch.Tensor) -> Rows:
        matrix, last_keys, last_values = core.split([core.shape[-1], len(taps) // 2, len(taps) // 2], dim=1)
        keys, last_keys = convolve(keys, last_keys, taps[: len(taps) // 2], valid)
        values, last_values = convolve(values, last_values, taps[len(taps) // 2 :], valid)
        return torch.cat([delta_update(matrix, keys, values, valid), last_keys, last_values], dim=1)

    with after_update_layer(widen), carrying(lambda rule: rule.conv_size - 1), with_write(write):
        yield


@contextmanager
def with_update(update: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Another rule in place of the delta rule: (core, keys, values, valid) -> core."""
    with patch.dict(reference.UPDATES, delta=update):
        yield


def update_in_heads(
    count: int, core: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None
) -> torch.Tensor:
    """`count` memories of rank r / count on the diagonal of the core, each with its own share of keys and values."""
    shares = [x.chunk(count, dim=-1) for x in (keys, values)]
    blocks = [rows.chunk(count, dim=2)[i] for i, rows in enumerate(core.chunk(count, dim=1))]
    new = [delta_update(block, k, v, valid) for block, k, v in zip(blocks, *shares)]
    return torch.stack([torch.block_diag(*matrices) for matrices in zip(*new)])


with_heads = partial(with_update, partial(update_in_heads, 4))


def update_by_length(
    core: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None
) -> torch.Tensor:
    """Keys k / sqrt(1 + |k|^2) instead of unit ones: a short key writes little, so that its length is a gate."""
    keys = keys * (1 + keys.square().sum(-1, keepdim=True)).rsqrt()
    return asymmetric_update(core, keys, keys, values, valid)


def asymmetric_update(
    core: torch.Tensor, written: torch.Tensor, erased: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None
) -> torch.Tensor:
    """M <- M + k (v - M^T e)^T token by token, with keys k that are written and e that are erased, of any length."""
    if valid is not None:
        written, erased, values = (x.masked_fill(~valid[..., None], 0.0) for x in (written, erased, values))
    # An eviction is a single block here.
    u = torch.linalg.solve_triangular(erased @ written.mT, values - erased @ core, upper=False, unitriangular=True)
    return core + written.mT @ u


with_length_as_gate = partial(with_update, update_by_length)


@contextmanager
def with_channel_gates() -> Iterator[None]:
    """Two gates a channel, of what is written and of what is erased, that start open.

    They are read off the projected values, by matrices that stand under the weights of the keys' convolution.
    """

    def widen(self: ThoughtEncoder, name: str, config: PTEConfig) -> None:
        usual = self.pte_key_conv[name].weight.data
        table = TokenTable(len(usual) + 2 * config.r, config.r)
        nn.init.zeros_(table.weight)
        table.weight.data[: len(usual)] = usual
        self.pte_key_conv[name] = table.requires_grad_(self.pte_key[name].weight.requires_grad)

    def write(core: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, valid: Valid, taps: torch.Tensor) -> Rows:
        r = core.shape[-1]
        taps, of_values, of_keys = taps.split([len(taps) - 2 * r, r, r])
        keys, last = convolve(keys, core[:, r:], taps, valid)
        keys, gates = unit_rows(keys), [torch.sigmoid(values @ w.mT + GATE_START) for w in (of_values, of_keys)]
        matrix = asymmetric_update(core[:, :r], keys, keys * gates[1], values * gates[0], valid)
        return torch.cat([matrix, last], dim=1)

    with after_update_layer(widen), with_write(write):
        yield


@contextmanager
def with_least_squares(ridge: float = 1.0) -> Iterator[None]:
    """Sums G = sum k k^T and H = sum k v^T, read as M = (G + ridge I)^-1 H: the order of tokens does not matter.

    G stands under what else is carried.
    """

    def write(core: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, valid: Valid, taps: torch.Tensor) -> Rows:
        r = core.shape[-1]
        sums, last, gram = core.split([r, len(taps), r], dim=1)
        keys, last = convolve(keys, last, taps, valid)
        keys = unit_rows(keys)
        if valid is not None:
            keys = keys.masked_fill(~valid[..., None], 0.0)
        return torch.cat([sums + keys.mT @ values, last, gram + keys.mT @ keys], dim=1)

    def read_layers(rule: StateRule, cores: torch.Tensor, reading: Reading) -> torch.Tensor:
        sums, gram = cores[:, :, : rule.r], cores[:, :, -rule.r :]
        solved = torch.linalg.solve(gram + ridge * torch.eye(rule.r), sums)
        return reading.initial[:, None] + bound_rows((reading.query[:, None] @ solved).mT)

    with (
        carrying(lambda rule: rule.r),
        with_write(write),
        patch.object(peft_pte.encoder, "read_layers", read_layers),
        patch.object(peft_pte.stacked, "read_layers", read_layers),
    ):
        yield
