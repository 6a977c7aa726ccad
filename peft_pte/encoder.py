"""The thought encoder of one attention layer: its parameters, and the state they make of evicted keys and values."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import peft_pte_kernels
from peft_pte_kernels import reference
from peft_pte_kernels.reference import normalize_state, unit_rows

from .config import PTEConfig
from .layer import PTELayer, device_of, is_fused, is_sharded_tensor
from .rotary import KeyPositions

# Must not contain the prefix "pte_": PEFT's delete_adapter passes over modules whose name does.
ENCODER_NAME = "thought_encoder"


class Evicted(NamedTuple):
    """What leaves one layer's cache at once: keys (after RoPE) and values [B, H_kv, m, head_dim].

    `positions` knows where they stood; `valid` [B, m] is False for slots that hold no token, None if all do.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: KeyPositions
    valid: torch.Tensor | None


class StateRule(NamedTuple):
    """How one adapter's state is made; see `PTEConfig`."""

    r: int
    num_global_tokens: int
    update: str
    norm: str
    norm_type: str
    encode_keys: str
    conv_size: int
    write_gate: bool

    @property
    def num_carried(self) -> int:
        """Rows of what a sequence carries, [B, rows, r]: the core's r, and the keys that the convolution will read."""
        return self.r + self.conv_size - 1

    @property
    def num_taps(self) -> int:
        """Rows of `pte_key_conv`: the convolution's weights of earlier keys, and the gate of writes under them."""
        return self.conv_size - 1 + self.write_gate


class Reading(NamedTuple):
    """What a core is read with, both [..., r, r]: Q (unit rows for the delta rule) and S_0 (Eq. 6).

    Unit rows of Q: on its scale the training stability of the delta rule hangs.
    """

    query: torch.Tensor
    initial: torch.Tensor


def state_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """States are float32, also in half-precision models, and float64 in float64 models."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def initial_state(
    rule: StateRule, query: torch.Tensor, keys: torch.Tensor | None = None, values: torch.Tensor | None = None
) -> torch.Tensor:
    """S_0 (Eq. 6) of Q [..., r, r] and the projected global tokens [..., G, r], if there are any.

    Before any normalisation but that of the delta rule.
    """
    if keys is None:
        return torch.zeros_like(query)
    state = query @ (keys.mT @ values)
    return unit_rows(state) if rule.update == "delta" else state


def reading_of(rule: StateRule, query: torch.Tensor, *projected: torch.Tensor) -> Reading:
    """Q as it is used, and S_0; arguments as `initial_state`."""
    initial = initial_state(rule, query, *projected)
    return Reading(unit_rows(query) if rule.update == "delta" else query, initial)


# "cuda" and the like; None on machines that have a CPU only.
ACCELERATOR = getattr(torch.accelerator.current_accelerator(), "type", None)


def full_precision() -> torch.autocast:
    """States are float32 under autocast too, wherever parameters lie: they may be offloaded while autocast is not."""
    accelerated = ACCELERATOR is not None and torch.is_autocast_enabled(ACCELERATOR)
    return torch.autocast(ACCELERATOR if accelerated else "cpu", enabled=False)


class StateLinear(nn.Linear):
    """A bias-free linear map computed in the state's precision whatever the dtype of weight and input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = state_dtype(x, self.weight)
        return F.linear(x.to(dtype), self.weight.to(dtype))


class TokenTable(nn.Embedding):
    """Learned tokens in key/value space; a call returns the whole table [num_tokens, d_kv].

    An embedding, called as a module, so that FSDP gathers its weight and PEFT and TRL find it by name.
    """

    def forward(self) -> torch.Tensor:
        # ZeRO-3 empties the weight after the call, and what would be the weight itself with it.
        return self.weight.to(state_dtype(self.weight), copy=is_sharded_tensor(self.weight))


class ThoughtEncoder(nn.Module, PTELayer):
    """Parameters (by adapter) and state arithmetic of one attention layer.

    With d_kv = kv_heads * head_dim: `pte_query_tokens` q_g [r, d_kv], `pte_global_tokens` h [G, d_kv],
    `pte_query`, `pte_key`, `pte_value`: W_Q, W_K, W_V [r, d_kv]; with a convolution `pte_key_conv` [conv_size - 1, r],
    the weights of the key before, and so on; a gate of writes is one more row of it. What is carried from eviction to
    eviction (the "core", with the last conv_size - 1 projected keys as rows under it) is an argument and a result,
    never an attribute.
    """

    adapter_layer_names = (
        "pte_query_tokens",
        "pte_global_tokens",
        "pte_query",
        "pte_key",
        "pte_value",
        "pte_key_conv",
    )
    other_param_names = ("pte_rule",)

    def __init__(self, anchor: nn.Module, adapter_name: str, d_kv: int):
        super().__init__()
        self._anchor = [anchor]  # in a list: a reference for device and dtype, not a child
        self.d_kv = d_kv
        self.pte_rule: dict[str, StateRule] = {}
        for container in self.adapter_layer_names:
            setattr(self, container, nn.ModuleDict({}))
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name

    def get_base_layer(self) -> nn.Module:
        """A sibling projection: PEFT asks it for device and dtype."""
        return self._anchor[0]

    def update_layer(self, adapter_name: str, config: PTEConfig) -> None:
        """Add (or replace) the parameters of one adapter."""
        r, d_kv, num_tokens = config.r, self.d_kv, config.num_global_tokens
        self.pte_rule[adapter_name] = StateRule(
            r,
            num_tokens,
            config.state_update,
            config.norm,
            config.state_norm_type,
            config.encode_keys,
            config.num_convolved,
            config.write_gate,
        )
        self.pte_query_tokens[adapter_name] = TokenTable(r, d_kv)
        if num_tokens:
            self.pte_global_tokens[adapter_name] = TokenTable(num_tokens, d_kv)
        elif adapter_name in self.pte_global_tokens:
            del self.pte_global_tokens[adapter_name]
        for container in (self.pte_query, self.pte_key, self.pte_value):
            container[adapter_name] = StateLinear(d_kv, r, bias=False)
            nn.init.normal_(container[adapter_name].weight, std=d_kv**-0.5)
        if num_taps := self.pte_rule[adapter_name].num_taps:
            self.pte_key_conv[adapter_name] = TokenTable(num_taps, r)
            if config.init_weights:
                nn.init.zeros_(self.pte_key_conv[adapter_name].weight)
        elif adapter_name in self.pte_key_conv:
            del self.pte_key_conv[adapter_name]
        self._move_adapter_to_device_of_base_layer(adapter_name, device_of(self.get_base_layer()))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def query(self, name: str) -> torch.Tensor:
        """Q = W_Q q_g, [r, r]."""
        return self.pte_query[name](self.pte_query_tokens[name]())

    def reading(self, name: str) -> Reading:
        """Q and S_0, both [r, r]."""
        rule, query = self.pte_rule[name], self.query(name)
        if not rule.num_global_tokens:
            reading = reading_of(rule, query)
        else:
            tokens = self.pte_global_tokens[name]()
            reading = reading_of(rule, query, self.pte_key[name](tokens), self.pte_value[name](tokens))
        if rule.num_taps and torch.is_grad_enabled():
            # The convolution has a gradient like all parameters, also where nothing has been evicted.
            reading = reading._replace(initial=reading.initial + self.pte_key_conv[name]()[:0].sum())
        return reading

    def start(self, name: str, batch_size: int) -> torch.Tensor:
        """What an empty cache carries: M = 0, or the normalised S_0 where the state is normalised on write (Eq. 4)."""
        rule = self.pte_rule[name]
        if rule.norm == "write":
            return start_of(rule, self.reading(name).initial[None], batch_size)[0]
        weight = self.pte_key[name].weight
        # Offloaded weights are on `meta`, and only what a module returns is where the computation is.
        like = self.query(name) if weight.is_meta else weight
        return torch.zeros(batch_size, rule.num_carried, rule.r, dtype=state_dtype(weight), device=like.device)

    def write(
        self,
        name: str,
        core: torch.Tensor,
        attention: nn.Module,
        evicted: Evicted,
        query: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encode evicted keys and values into the core (Eq. 3 and 4, or the delta rule): [B, rows, r] -> [B, rows, r].

        `query`: Q, if it has been computed.
        """
        rule = self.pte_rule[name]
        if rule.update == "none":
            return core
        if self.is_fused(name, evicted.keys):
            if query is None and rule.norm == "write":
                query = self.query(name)
            stacked_query = None if query is None else query[None]
            return write_layers(name, core[None], [(attention, self)], [evicted], stacked_query)[0]
        dtype = state_dtype(evicted.keys, core)
        keys = evicted.positions.take_out(attention, evicted.keys.to(dtype), rule.encode_keys)
        keys = self.pte_key[name](keys.transpose(1, 2).flatten(2))  # [B, m, r]
        values = self.pte_value[name](evicted.values.transpose(1, 2).flatten(2))
        valid = None if evicted.valid is None else evicted.valid.to(keys.device)
        taps = self.pte_key_conv[name]() if rule.num_taps else None
        if rule.norm != "write":
            return reference.write(rule.update, core, keys, values, valid, taps)
        state, last = core[:, : rule.r], core[:, rule.r :]
        added = reference.write(rule.update, torch.cat([torch.zeros_like(state), last], 1), keys, values, valid, taps)
        state = state + (self.query(name) if query is None else query) @ added[:, : rule.r]
        return torch.cat([normalize_state(state, rule.norm_type), added[:, rule.r :]], 1)

    def is_fused(self, name: str, keys: torch.Tensor) -> bool:
        """Whether keys and values are encoded by a kernel, which reads the weights where they lie."""
        modules = [c[name] for c in (self.pte_key, self.pte_value, self.pte_key_conv) if name in c]
        return is_fused(modules, keys, rank=self.pte_rule[name].r)

    def read(self, name: str, core: torch.Tensor) -> torch.Tensor:
        """The state S [B, r, r] that the projections use."""
        rule = self.pte_rule[name]
        if rule.norm == "write":
            return core[:, : rule.r]
        query, initial = self.reading(name)
        return read_layers(rule, core[None], Reading(query[None], initial[None]))[0]

    def advance(
        self, cores: dict[str, torch.Tensor], attention: nn.Module, evicted: Evicted | None, batch_size: int
    ) -> dict[str, torch.Tensor]:
        """Start the cores of the live adapters, or carry them on: by adapter name, each [B, rows, r]."""
        advanced = {}
        with full_precision():
            for name in self.live_adapters:
                core = cores.get(name)
                if core is None:
                    core = self.start(name, batch_size)
                elif self.in_step:
                    core = core + self.start(name, batch_size)[:0].sum()
                if evicted is not None:
                    core = self.write(name, core, attention, evicted)
                elif self.in_step:
                    core = core + self.write_nothing(name)
                advanced[name] = core
        return advanced

    def read_all(self, cores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The states of the live adapters by name, each [B, r, r]."""
        with full_precision():
            states = {name: self.read(name, cores[name]) for name in self.live_adapters}
            if torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
                states = {name: state + self.touch(name) for name, state in states.items()}
            return states

    @property
    def in_step(self) -> bool:
        """Whether every call has to use the same modules in the same order as every other one.

        ZeRO-3 gathers the weights of a module when it is called, which all processes must do together. But their
        sequences differ: only the first segment starts a core, and not all evict. What is not needed is then computed
        for nothing.
        """
        return any(hasattr(linear.weight, "ds_id") for linear in self.pte_key.values())

    def write_nothing(self, name: str) -> torch.Tensor:
        """Zero, by way of the modules that `write` calls."""
        rule, weight = self.pte_rule[name], self.pte_key[name].weight
        if rule.update == "none":
            return torch.zeros((), dtype=state_dtype(weight), device=weight.device)
        empty = torch.empty(0, self.d_kv, dtype=weight.dtype, device=weight.device, requires_grad=True)
        zero = self.pte_key[name](empty).sum() + self.pte_value[name](empty).sum()
        if rule.num_taps:
            zero = zero + self.pte_key_conv[name]()[:0].sum()
        return zero + self.query(name)[:0].sum() if rule.norm == "write" else zero

    def touch(self, name: str) -> torch.Tensor:
        """Zero, by way of every parameter, so that in every segment of every process all of them have a gradient.

        DDP and FSDP wait for gradients that would be missing where nothing has been evicted.
        """
        empty = self.pte_query_tokens[name]()[:0]
        if name in self.pte_global_tokens:
            empty = torch.cat([empty, self.pte_global_tokens[name]()[:0]])
        linears = (self.pte_query[name], self.pte_key[name], self.pte_value[name])
        zero = sum(linear(empty).sum() for linear in linears)
        return zero + self.pte_key_conv[name]()[:0].sum() if name in self.pte_key_conv else zero

    def forward(self) -> None:
        """Not used: the encoder is called through `advance` by the attention module's hooks."""
        raise NotImplementedError("ThoughtEncoder has no forward; see `advance`.")

    def __repr__(self) -> str:
        return "pte." + super().__repr__()


def start_of(rule: StateRule, initial: torch.Tensor, batch_size: int) -> torch.Tensor:
    """What an empty cache carries in layers of one rule, [L, B, rows, r]; `initial`: S_0 [L, r, r]."""
    start = initial.new_zeros(len(initial), batch_size, rule.num_carried, rule.r)
    if rule.norm != "write":
        return start
    state = normalize_state(initial, rule.norm_type)[:, None].expand(-1, batch_size, -1, -1)
    return torch.cat([state, start[:, :, rule.r :]], dim=2)


def read_layers(rule: StateRule, cores: torch.Tensor, reading: Reading) -> torch.Tensor:
    """The states of layers of one rule, [L, B, r, r], from what they carry and from Q and S_0 [L, r, r].

    Delta rule: values on the side of A, keys on the side of B, so the product is transposed: S (B x) asks M with
    Q^T B x as the query and gets values, which is what the rule stores them for. The paper's order, which the sum
    keeps, asks values for keys.
    """
    cores = cores[:, :, : rule.r]
    if rule.norm == "write":
        return cores
    initial = reading.initial[:, None]
    if rule.update == "none":
        states = initial.expand_as(cores)
        return normalize_state(states, rule.norm_type) if rule.norm == "read" else states
    norm = rule.norm_type if rule.norm == "read" else rule.norm
    return peft_pte_kernels.read_state(cores, reading.query, initial, rule.update == "delta", norm)


def write_layers(
    name: str,
    cores: torch.Tensor,
    layers: list[tuple[nn.Module, ThoughtEncoder]],
    evicted: list[Evicted],
    query: torch.Tensor | None,
) -> torch.Tensor:
    """As `ThoughtEncoder.write`, by a kernel for several layers: cores [L, B, rows, r] -> [L, B, rows, r].

    `layers`: attention module and encoder of each; what has left them has the same positions. `query`: Q [L, r, r],
    which only states that are normalised on write need here.
    """
    attention, encoder = layers[0]
    rule = encoder.pte_rule[name]
    keys = [gone.keys for gone in evicted]
    try:
        rotation = evicted[0].positions.rotation(attention, rule.encode_keys)
    except LookupError:
        rotation, dtype = None, cores.dtype
        keys = [
            gone.positions.take_out(attention, gone.keys.to(dtype), rule.encode_keys).to(gone.keys.dtype)
            for (attention, _), gone in zip(layers, evicted)
        ]
    if rotation is not None:
        rotation = rotation._replace(cos=rotation.cos.to(cores.device), sin=rotation.sin.to(cores.device))
    valid = evicted[0].valid
    arguments = (
        keys,
        [gone.values for gone in evicted],
        [encoder.pte_key[name].weight for _, encoder in layers],
        [encoder.pte_value[name].weight for _, encoder in layers],
    )
    taps = [encoder.pte_key_conv[name].weight for _, encoder in layers] if rule.num_taps else None
    options = rule.update, rotation, None if valid is None else valid.to(cores.device), taps
    if rule.norm != "write":
        return peft_pte_kernels.encode(*arguments, cores, *options)
    states, last = cores[:, :, : rule.r], cores[:, :, rule.r :]
    nothing = torch.zeros_like(states)
    added = peft_pte_kernels.encode(*arguments, torch.cat([nothing, last], 2) if taps else nothing, *options)
    states = peft_pte_kernels.read_state(added[:, :, : rule.r], query, states, False, rule.norm_type)
    return torch.cat([states, added[:, :, rule.r :]], dim=2) if taps else states
