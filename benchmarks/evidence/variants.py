"""Changes of the method that were tried and are not in the package, each in force inside a `with` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn

import peft_pte.encoder
import peft_pte.stacked
from peft_pte import PTEConfig
from peft_pte.encoder import Evicted, Reading, StateRule, ThoughtEncoder
from peft_pte_kernels.reference import bound_rows, unit_rows

GATE_SCALE = 4.0  # logits move faster than weights do at one learning rate


@contextmanager
def with_gate(from_projections: bool) -> Iterator[None]:
    """A learned gate for each token: `M <- M + beta k (v - M^T k)^T`, beta = sigmoid(4 w x + 1).

    x is what leaves the cache, [k_e, v_e], or its projections [W_K k_e, W_V v_e]. Computed as the delta rule of
    sqrt(beta) k and sqrt(beta) v.
    """
    update_layer = ThoughtEncoder.update_layer

    def with_gate_parameters(self: ThoughtEncoder, name: str, config: PTEConfig) -> None:
        width = 2 * (config.r if from_projections else self.d_kv)
        self.pte_gate[name] = nn.Linear(width, 1)
        nn.init.normal_(self.pte_gate[name].weight, std=0.1 * (width / 2) ** -0.5)
        nn.init.ones_(self.pte_gate[name].bias)
        update_layer(self, name, config)

    def write(
        self: ThoughtEncoder,
        name: str,
        core: torch.Tensor,
        attention: nn.Module,
        evicted: Evicted,
        query: torch.Tensor | None = None,
    ) -> torch.Tensor:
        keys = evicted.positions.take_out(attention, evicted.keys, self.pte_rule[name].encode_keys)
        keys, values = (x.transpose(1, 2).flatten(2) for x in (keys, evicted.values))
        k, v, gate = self.pte_key[name](keys), self.pte_value[name](values), self.pte_gate[name]
        seen = torch.cat([k, v] if from_projections else [keys, values], -1)
        root = torch.sigmoid(GATE_SCALE * (seen @ gate.weight[0])[..., None] + gate.bias).sqrt()
        k, v = unit_rows(k) * root, v * root
        if evicted.valid is not None:
            k, v = (x.masked_fill(~evicted.valid[..., None], 0.0) for x in (k, v))
        # As `delta_update`, which would make the keys unit vectors again; an eviction here is a single block.
        u = torch.linalg.solve_triangular(k @ k.mT, v - k @ core, upper=False, unitriangular=True)
        return core + k.mT @ u

    containers = (*ThoughtEncoder.adapter_layer_names, "pte_gate")
    with patch.multiple(ThoughtEncoder, adapter_layer_names=containers, update_layer=with_gate_parameters, write=write):
        yield


@contextmanager
def with_transposed_read() -> Iterator[None]:
    """S = S_0 + bound((Q M)^T) for the sum too: what is looked up are keys, and what comes back are values."""

    def read_layers(rule: StateRule, cores: torch.Tensor, reading: Reading) -> torch.Tensor:
        return reading.initial[:, None] + bound_rows((reading.query[:, None] @ cores).mT)

    with (
        patch.object(peft_pte.encoder, "read_layers", read_layers),
        patch.object(peft_pte.stacked, "read_layers", read_layers),
    ):
        yield


@contextmanager
def with_values_scaled(factor: float) -> Iterator[None]:
    """W_V starts `factor` times as large: with unit keys and a unit query it alone sets how large states start."""
    update_layer = ThoughtEncoder.update_layer

    def scaled(self: ThoughtEncoder, name: str, config: PTEConfig) -> None:
        update_layer(self, name, config)
        self.pte_value[name].weight.data.mul_(factor)

    with patch.object(ThoughtEncoder, "update_layer", scaled):
        yield


@contextmanager
def with_orthogonal_query() -> Iterator[None]:
    """Q = W_Q q_g starts as a rotation, so that no direction of the core is read louder than another."""
    update_layer = ThoughtEncoder.update_layer

    def orthogonal(self: ThoughtEncoder, name: str, config: PTEConfig) -> None:
        update_layer(self, name, config)
        # q_g solves W_Q q_g^T = R^T for a random rotation R.
        weight, rotation = self.pte_query[name].weight, torch.empty(config.r, config.r)
        nn.init.orthogonal_(rotation)
        self.pte_query_tokens[name].weight.data.copy_(torch.linalg.lstsq(weight.detach(), rotation).solution.mT)

    with patch.object(ThoughtEncoder, "update_layer", orthogonal):
        yield
