"""The mathematics of the state, as plain functions of tensors. Fused kernels are to compute exactly these.

Shapes: B rows of a batch, m evicted tokens, r the rank. A core M is [B, r, r] and starts at zero; a state S is
[B, r, r] and is used as `dW = A S B` (Eq. 5). Everything is float32 or float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# The delta rule is solved in blocks of this many tokens: quadratic inside a block, linear across blocks.
DELTA_BLOCK = 64


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """Scale the last dimension to unit L2 norm; rows of zeros stay zero."""
    return F.normalize(x, dim=-1, eps=1e-12)


def normalize_state(state: torch.Tensor, norm_type: str) -> torch.Tensor:
    """Normalize of Eq. 4, [..., r, r]: unit rows, or (Frobenius) a unit root-mean-square row norm."""
    if norm_type == "row":
        return unit_rows(state)
    norm = torch.linalg.matrix_norm(state, keepdim=True).clamp(min=1e-12)
    return state * (state.shape[-1] ** 0.5 / norm)


def initial_state(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Eq. 6: S_0 = (W_Q q_g) (W_K h)^T (W_V h). `query` [r, r], `keys` and `values` [G, r]; returns [r, r]."""
    return query @ (keys.mT @ values)


def sum_update(
    core: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None
) -> torch.Tensor:
    """The core of Eq. 3 and 4: M <- M + K~^T V~. `keys`, `values` [B, m, r]; `valid` [B, m], False: not encoded."""
    if valid is not None:
        keys = keys.masked_fill(~valid[..., None], 0.0)
        values = values.masked_fill(~valid[..., None], 0.0)
    return core + keys.mT @ values


def delta_update(
    core: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None
) -> torch.Tensor:
    """The delta rule, token by token M <- M + k (v - M^T k)^T with unit keys k, in its exact chunk-parallel form.

    With u_i = v_i - M_{i-1}^T k_i, and M_{i-1} = M_0 + sum_{j<i} k_j u_j^T, the u of a block solve the unit lower
    triangular system (I + strict_lower(K K^T)) U = V - K M_0, and M = M_0 + K^T U. Masked tokens have k = u = 0, and
    so change nothing. Shapes as in `sum_update`.
    """
    keys = unit_rows(keys)
    if valid is not None:
        keys = keys.masked_fill(~valid[..., None], 0.0)
        values = values.masked_fill(~valid[..., None], 0.0)
    for k, v in zip(keys.split(DELTA_BLOCK, dim=-2), values.split(DELTA_BLOCK, dim=-2)):
        # solve_triangular reads only the strict lower part when the diagonal is declared to be one.
        u = torch.linalg.solve_triangular(k @ k.mT, v - k @ core, upper=False, unitriangular=True)
        core = core + k.mT @ u
    return core
