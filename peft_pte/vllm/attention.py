"""The attention layer under vLLM, whose sequences carry a state of fixed size.

A page of a request and layer is [core | state | keys | values]: what was encoded, S as it is read, and the slots of
the retained prefix and of the window. Which slots are in use follows from the plan (plan.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

# Found by structure, as that of every attention module (`find_rotation`): it takes positions out of evicted keys.
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as apply_rotary_pos_emb
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from peft_pte_kernels import low_rank_update

from ..encoder import Evicted, ThoughtEncoder
from ..rotary import KeyPositions
from .folder import served, weight_names
from .plan import Piece, Row, num_slots

ADAPTER = "default"
READERS = ("q_proj", "k_proj", "v_proj")


class LowRank(nn.Module):
    """A [out, r], B [r, in] and perhaps a gate G [r, in] of one projection, in float32 as PEFT holds them."""

    def __init__(self, width: int, r: int, out_features: int, gated: bool):
        super().__init__()
        shapes = {"A": (out_features, r), "B": (r, width)} | ({"gate": (r, width)} if gated else {})
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(parameter.shape)}" for name, parameter in self.named_parameters())


class PTEAttention(nn.Module, MambaBase):
    """Attention of Llama, Qwen2 and Qwen3 with a bounded cache and `y += scaling * A S B x` at its projections.

    Takes the place of vLLM's `LlamaAttention`, with the same weights. The adapter's own are in `low_rank`, by the name
    of the projection, and in `thought_encoder`; layers without an adapter have none, and evict all the same.
    """

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        max_position_embeddings: int = 8192,
        quant_config: Any = None,
        bias: bool = False,
        bias_o_proj: bool = False,
        cache_config: Any = None,
        prefix: str = "",
        attn_type: str = "decoder",
    ):
        super().__init__()
        vllm_config = get_current_vllm_config()
        self.prefix = prefix
        self.dtype = vllm_config.model_config.dtype
        self.served = served(vllm_config.model_config)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = getattr(config, "head_dim", None) or hidden_size // num_heads
        self.widths = [num_heads * self.head_dim, num_kv_heads * self.head_dim, num_kv_heads * self.head_dim]
        bias = bias or config.model_type == "qwen2"  # which has it always, and says so nowhere
        self.qkv_proj = QKVParallelLinear(
            hidden_size,
            self.head_dim,
            num_heads,
            num_kv_heads,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            self.widths[0], hidden_size, bias=bias_o_proj, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if config.model_type == "qwen3":
            self.q_norm, self.k_norm = (RMSNorm(self.head_dim, eps=config.rms_norm_eps) for _ in range(2))
        self.rotary_emb = get_rope(
            self.head_dim, max_position=max_position_embeddings, rope_parameters=config.rope_parameters
        )
        self.key_rotary_emb = LlamaRotaryEmbedding(config)
        self._add_adapter(hidden_size)
        self.kv_cache: tuple[torch.Tensor, ...] = (torch.tensor([]),) * 4  # until vLLM binds pages
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"There are two layers of the name {prefix!r}.")
        layers[prefix] = self

    def _add_adapter(self, hidden_size: int) -> None:
        """Make the adapter's modules, as far as it has weights for this layer."""
        config = self.served.config
        own = f"{self.prefix}."
        names = {name.removeprefix(own) for name in weight_names(self.served.folder) if name.startswith(own)}
        self.thought_encoder: ThoughtEncoder | None = None
        self.low_rank = nn.ModuleDict()
        self.scaling = {name: config.scaling_of(f"{own}{name}") for name in (*READERS, "o_proj")}
        self.asks_with_input = config.output_source == "hidden_states"  # of the module, at the output projection
        if not names:
            return
        self.thought_encoder = ThoughtEncoder(self.qkv_proj, ADAPTER, self.widths[1])
        self.thought_encoder.update_layer(ADAPTER, config)
        self.thought_encoder.float().requires_grad_(False)
        for name, width in zip(READERS, self.widths):
            if f"low_rank.{name}.A" in names:
                self.low_rank[name] = LowRank(hidden_size, config.r, width, False)
        if "low_rank.o_proj.A" in names:
            width = hidden_size if self.asks_with_input else self.widths[0]
            self.low_rank["o_proj"] = LowRank(width, config.r, hidden_size, config.has_output_gate)

    # ------------------------------------------------------------------------------------------- what vLLM asks a layer

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum["PTE"]

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """Core, state, keys and values of one sequence; of the same size in all layers, adapted or not."""
        config = self.served.config
        slots = num_slots(config.cache_policy, self.served.max_prompt_length)
        core = (config.r + config.num_convolved - 1, config.r)
        heads = (self.num_kv_heads, slots, self.head_dim)
        return core, (config.r, config.r), heads, heads

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """The wide ones first, which must be aligned."""
        return torch.float32, torch.float32, self.dtype, self.dtype

    # -------------------------------------------------------------------------------------------------------- a forward

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """`positions` [T], `hidden_states` [T, D] of the tokens of a step -> [T, D]."""
        output = torch.empty_like(hidden_states)
        torch.ops.vllm.pte_attention(positions, hidden_states, output, self.prefix)
        return output

    def compute(self, positions: torch.Tensor, hidden_states: torch.Tensor, output: torch.Tensor) -> None:
        """As `forward`, into `output`. What does not depend on states is computed for all tokens at once."""
        metadata = get_forward_context().attn_metadata
        pieces: list[Piece] = [] if metadata is None else metadata[self.prefix]  # none: a trial, to measure memory
        qkv, _ = self.qkv_proj(hidden_states)
        attended = qkv.new_zeros(len(qkv), self.widths[0])
        states = []
        for piece in pieces:
            for row in piece.rows:
                self._prepare(row)
            states.append(self.kv_cache[1][piece.pages])
            attended[piece.tokens] = self._attend(piece, positions, hidden_states, qkv, states[-1])
        projected, _ = self.o_proj(attended)
        output.copy_(projected)
        for piece, state in zip(pieces, states):
            asked = hidden_states if self.asks_with_input else attended
            shape = len(piece.rows), -1
            base = [projected[piece.tokens].unflatten(0, shape)]
            [updated] = self._updated(("o_proj",), asked[piece.tokens].unflatten(0, shape), base, state)
            output[piece.tokens] = updated.flatten(0, 1)

    def _updated(
        self, names: tuple[str, ...], asked: torch.Tensor, bases: list[torch.Tensor], state: torch.Tensor
    ) -> list[torch.Tensor]:
        """`bases` [B, T, out] of projections of one input, with the update of those that are adapted (Eq. 5)."""
        updated = dict(zip(names, bases))
        for scaling in dict.fromkeys(self.scaling[name] for name in names if name in self.low_rank):
            together = [name for name in names if name in self.low_rank and self.scaling[name] == scaling]
            layers = [self.low_rank[name] for name in together]
            results = low_rank_update(
                asked,
                [updated[name] for name in together],
                state,
                [layer.A for layer in layers],
                [layer.B for layer in layers],
                scaling,
                getattr(layers[0], "gate", None),
            )
            updated.update(zip(together, results))
        return list(updated.values())

    def _attend(
        self,
        piece: Piece,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        qkv: torch.Tensor,
        state: torch.Tensor,
    ) -> torch.Tensor:
        """Store a piece's keys and values, and attend: [B * T, D_q]. `state` [B, r, r] of its rows."""
        shape = len(piece.rows), -1
        asked = hidden_states[piece.tokens].unflatten(0, shape)
        bases = list(qkv[piece.tokens].unflatten(0, shape).split(self.widths, dim=-1))
        query, key, value = (x.flatten(0, 1) for x in self._updated(READERS, asked, bases, state))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = (
                norm(x.reshape(len(x), -1, self.head_dim)).flatten(1)
                for norm, x in ((self.q_norm, query), (self.k_norm, key))
            )
        query, key = self.rotary_emb(positions[piece.tokens], query.contiguous(), key.contiguous())
        # Each [B, H, T, head_dim].
        query, key, value = (
            x.unflatten(0, shape).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (query, key, value)
        )
        results = [self._attend_row(row, *row_of) for row, *row_of in zip(piece.rows, query, key, value)]
        return torch.stack(results).transpose(1, 2).flatten(2).flatten(0, 1)

    def _attend_row(self, row: Row, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of a sequence's next tokens, [H, T, head_dim], to them and to all that is stored."""
        length = query.shape[1]
        end = row.stored + length
        keys, values = (pages[row.page, :, :end] for pages in self.kv_cache[2:])
        keys[:, row.stored :], values[:, row.stored :] = key, value
        mask = None
        if length > 1:
            mask = torch.ones(length, end, dtype=torch.bool, device=query.device).tril(row.stored)
        return F.scaled_dot_product_attention(query[None], keys[None], values[None], mask, enable_gqa=True)[0]

    def _prepare(self, row: Row) -> None:
        """Before a sequence's next tokens: begin its state, or let thoughts leave."""
        encoder, (cores, states, *slots) = self.thought_encoder, self.kv_cache
        if row.is_new and encoder is not None:  # the page holds what its last owner left there
            begun = encoder.advance({}, self, None, 1)
            cores[row.page], states[row.page] = begun[ADAPTER][0], encoder.read_all(begun)[ADAPTER][0]
        if not row.leaving:
            return
        first, last = row.prefix, row.prefix + row.leaving
        keys, values = (pages[row.page] for pages in slots)
        if encoder is not None:
            if row.positions is None:
                leaving = torch.arange(first + row.gone, last + row.gone, device=keys.device)
                row.positions = KeyPositions(self.key_rotary_emb, leaving[None])
            evicted = Evicted(keys[None, :, first:last], values[None, :, first:last], row.positions, None)
            written = encoder.advance({ADAPTER: cores[row.page][None]}, self, evicted, 1)
            cores[row.page], states[row.page] = written[ADAPTER][0], encoder.read_all(written)[ADAPTER][0]
        for buffer in (keys, values):
            buffer[:, first : row.stored] = buffer[:, last : row.stored + row.leaving].clone()


def pte_attention(positions: torch.Tensor, hidden_states: torch.Tensor, output: torch.Tensor, layer_name: str) -> None:
    """`PTEAttention.compute` as an operator, which compilers take as one."""
    get_forward_context().no_compile_layers[layer_name].compute(positions, hidden_states, output)


def nothing(positions: torch.Tensor, hidden_states: torch.Tensor, output: torch.Tensor, layer_name: str) -> None:
    """The operator's effect on shapes."""


direct_register_custom_op(op_name="pte_attention", op_func=pte_attention, mutates_args=["output"], fake_impl=nothing)
