"""A plain reference of Progressive Thought Encoding: one sequence, one token at a time, Python lists.

It is written for reading, not for speed, and shares no code with the package that it checks: it imports
torch and the standard library only, and reads nothing but the config and the weights of the Hugging Face
model it is given. All arithmetic happens in the dtype of those weights, RMSNorm, rotary tables and softmax
included, so that with a float64 model it is a float64 reference. Base weights are constants; the result is
differentiable in the adapter.

Equation numbers are those that the package uses:

    Eq. 3   S' = (W_Q q_g) (W_K K_e)^T (W_V V_e)       what an eviction of keys K_e and values V_e adds
    Eq. 4   S <- Normalize(S + S')                     after every eviction
    Eq. 5   y = W x + scaling * A S B x                for every adapted projection
    Eq. 6   S_0 = (W_Q q_g) (W_K h_g)^T (W_V h_g)      before any eviction, from the global tokens h_g
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "olmo2")
TINY = 1e-12  # lower bound of every norm that is divided by


@dataclass
class ReferenceResult:
    """What a run leaves behind."""

    logits: Tensor  # [T, vocab], row t after reading token t
    states: list[Tensor | None]  # per layer: S as read at the end [r, r]; None for a layer without an encoder
    kept: list[int]  # indices of the tokens still in the cache: the prefix, then the retained thoughts
    evicted: int  # number of tokens that have left the cache


@dataclass
class CachedToken:
    """One token in the cache of one layer; the tensors are [kv_heads, head_dim]."""

    position: int  # absolute: counts on as if nothing had ever been dropped
    key_pre_rope: Tensor  # after the key norm of families that have one, before the rotation
    key_post_rope: Tensor  # what attention reads
    value: Tensor


def run_reference(
    base_model: Any,
    adapter: Mapping[str, Tensor] | None,
    config: Mapping[str, Any],
    tokens: list[int],
    prompt_length: int,
    position_offset: int = 0,
) -> ReferenceResult:
    """Read `tokens` one at a time under the cache policy.

    Args:
        base_model: A Hugging Face causal language model without adapter.
        adapter: Tensors named as in a PEFT state dict, without an adapter name. With None the policy is that
            of a plain sliding window: evicted thoughts are lost.
        config: r, pte_alpha, window_size, eviction_ratio, retained_prefix, state_update, state_norm,
            state_norm_type, encode_keys, conv_size, write_gate, output_source, output_gate. num_global_tokens is
            checked against the adapter if it is there.
        tokens: The whole sequence, without padding.
        prompt_length: How many of the tokens are prompt.
        position_offset: Rotary position of the first token.
    """
    model = ReferenceModel(base_model, adapter or {}, config)
    prefix, window, leave_at_once = schedule(config, len(tokens), prompt_length)
    logits, thoughts, evicted = [], 0, 0
    for index, token in enumerate(tokens):
        # The states change between two steps, never inside one: room is made in all layers before this
        # token's step, and all its projections, in every layer, use the states that this leaves.
        if index >= prefix:
            if thoughts == window:
                model.evict(prefix, leave_at_once)
                thoughts -= leave_at_once
                evicted += leave_at_once
            thoughts += 1
        logits.append(model.step(token, index + position_offset))
    return ReferenceResult(
        logits=torch.stack(logits),
        states=[None if state is None else state.read() for state in model.states],
        kept=[entry.position - position_offset for entry in model.caches[0]],
        evicted=evicted,
    )


def schedule(config: Mapping[str, Any], num_tokens: int, prompt_length: int) -> tuple[int, int, int]:
    """Kept prefix P, window C (in thoughts, the prefix not counted) and how many thoughts leave at once."""
    retained, window = config["retained_prefix"], config["window_size"]
    # With an int, the first k tokens of the sequence stay; the rest of the prompt streams like thoughts.
    prefix = prompt_length if retained == "prompt" else min(int(retained), num_tokens)
    window = prompt_length if window == "prompt" else int(window)
    if window < 1:
        raise ValueError(f"the window must hold at least one thought, not {window}")
    # Without the small term a product such as 0.29 * 100 = 28.999999999999996 would lose a thought.
    leave_at_once = max(1, math.floor(window * config["eviction_ratio"] + 1e-9))
    return prefix, window, min(leave_at_once, window)


# -------------------------------------------------------------------------------------------------- the state


def normalize_rows(matrix: Tensor) -> Tensor:
    """Every row divided by its L2 norm."""
    return matrix / torch.linalg.vector_norm(matrix, dim=-1, keepdim=True).clamp_min(TINY)


def normalize_frobenius(matrix: Tensor) -> Tensor:
    """Scaled as a whole, such that the rows have unit norm in the root mean square."""
    return matrix * math.sqrt(matrix.shape[0]) / torch.linalg.vector_norm(matrix).clamp_min(TINY)


def bound_rows(matrix: Tensor) -> Tensor:
    """Every row times 1 / sqrt(1 + |row|^2 / 4)."""
    return torch.stack([row / torch.sqrt(1 + row @ row / 4) for row in matrix])


class ThoughtState:
    """The state S [r, r] of one layer and one sequence."""

    def __init__(self, encoder: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        self.update, self.norm = config["state_update"], config["state_norm"]
        if self.update not in ("sum", "delta", "none") or self.norm not in ("bound", "read", "write", "none"):
            raise ValueError(f"unknown state_update {self.update!r} or state_norm {self.norm!r}")
        if self.update == "delta" and self.norm == "write":
            raise ValueError("the delta rule is normalised on read or not at all")
        self.normalize = {"row": normalize_rows, "frobenius": normalize_frobenius}[config["state_norm_type"]]
        self.w_key, self.w_value = encoder["pte_key"], encoder["pte_value"]
        self.query = encoder["pte_query_tokens"] @ encoder["pte_query"].T  # W_Q q_g, [r, r]
        rank = self.query.shape[0]
        if rank != config["r"]:
            raise ValueError(f"the adapter has {rank} query tokens, the config says r = {config['r']}")
        global_tokens = encoder.get("pte_global_tokens", self.w_key.new_zeros(0, self.w_key.shape[1]))
        if global_tokens.shape[0] != config.get("num_global_tokens", global_tokens.shape[0]):
            raise ValueError(f"{global_tokens.shape[0]} global tokens are not what the config says")
        # Eq. 6. Without global tokens the inner product runs over nothing and S_0 is zero.
        self.initial = self.query @ (global_tokens @ self.w_key.T).T @ (global_tokens @ self.w_value.T)
        self.core = self.query.new_zeros(rank, rank)  # M, what the evictions have written
        # The convolution's weights of the key before, the one before that, ..., and those keys, the last one first.
        self.taps = list(encoder.get("pte_key_conv", []))
        self.gate = self.taps.pop() if config["write_gate"] else None
        if len(self.taps) != config["conv_size"] - 1:
            raise ValueError(f"the adapter convolves {len(self.taps) + 1} keys, not conv_size = {config['conv_size']}")
        self.earlier = [self.query.new_zeros(rank)] * len(self.taps)
        self.written = self.normalize(self.initial)  # S itself, when it is normalised after each write

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Encode evicted keys and values [m, d_kv], oldest first."""
        keys, values = keys @ self.w_key.T, values @ self.w_value.T  # W_K K_e and W_V V_e, [m, r]
        keys = torch.stack([self.convolved(key) for key in keys])
        if self.update == "sum":
            self.core = self.core + keys.T @ values
            self.written = self.normalize(self.written + self.query @ (keys.T @ values))  # Eq. 4, with Eq. 3
        elif self.update == "delta":
            # Each token corrects what the memory answers to its key: M <- M + k (v - M^T k)^T with unit k.
            # A gate says how far: M <- M + beta k (v - M^T k)^T, beta between 0 and 2 by the key as it was.
            for key, unit, value in zip(keys, normalize_rows(keys), values, strict=True):
                beta = 1.0 if self.gate is None else 2 / (1 + torch.exp(-(self.gate @ key)))
                self.core = self.core + beta * torch.outer(unit, value - self.core.T @ unit)

    def convolved(self, key: Tensor) -> Tensor:
        """The key [r] of one token with those of the tokens that were written before it."""
        total = key
        for weight, earlier in zip(self.taps, self.earlier, strict=True):
            total = total + weight * earlier
        self.earlier = [key, *self.earlier][: len(self.taps)]
        return total

    def read(self) -> Tensor:
        """S as the projections use it."""
        if self.update == "delta":
            # Q and S_0 have unit rows always. Transposed, S answers B x, seen as a query through Q^T, with the values
            # that were stored under keys.
            initial, added = normalize_rows(self.initial), (normalize_rows(self.query) @ self.core).T
        elif self.norm == "write":
            return self.written
        else:
            initial, added = self.initial, self.query @ self.core  # with state_update="none" M stays zero
        if self.norm == "bound":
            return initial + bound_rows(added)
        state = initial + added
        return self.normalize(state) if self.norm == "read" else state


# -------------------------------------------------------------------------------------------------- the model


class ReferenceModel:
    """A decoder that reads one token at a time, with its caches and states."""

    def __init__(self, base_model: Any, adapter: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        self.hf = hf = base_model.config
        if hf.model_type not in FAMILIES or hf.hidden_act != "silu":
            raise ValueError(f"no reference for {hf.model_type} with {hf.hidden_act}")
        if hf.rope_parameters.get("rope_type", "default") != "default":
            raise ValueError("the reference knows the default rotary tables only")
        if getattr(hf, "sliding_window", None) is not None:
            raise ValueError("the reference knows full attention only")
        self.weights: dict[str, Tensor] = dict(base_model.state_dict())
        self.dtype = self.weights["model.norm.weight"].dtype
        # PEFT prepends "base_model.model." to the names of the model that it wraps.
        self.adapter = {
            name.removeprefix("base_model.model."): tensor.to(self.dtype) for name, tensor in adapter.items()
        }
        # An adapter with names that match nothing would be ignored in silence.
        modules = {name.rpartition(".pte_")[0] for name in self.adapter}
        for module in modules:
            if f"{module}.weight" not in self.weights and not module.endswith(".self_attn.thought_encoder"):
                raise ValueError(f"the adapter is for {module!r}, which the model lacks")
        self.num_heads, self.num_kv_heads = hf.num_attention_heads, hf.num_key_value_heads
        self.head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
        rotary_dim = int(self.head_dim * hf.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotary_dim, 2, dtype=self.dtype) / rotary_dim
        self.inverse_frequencies = 1.0 / hf.rope_parameters["rope_theta"] ** exponents
        self.encode_keys = config["encode_keys"]
        if self.encode_keys not in ("pre_rope", "chunk", "post_rope"):
            raise ValueError(f"unknown encode_keys {self.encode_keys!r}")
        self.alpha, self.rank, self.alpha_pattern = config["pte_alpha"], config["r"], config["alpha_pattern"]
        if config["output_source"] not in ("hidden_states", "attention_output"):
            raise ValueError(f"unknown output_source {config['output_source']!r}")
        self.output_reads_input = config["output_source"] == "hidden_states"
        gated = {name.split(".")[-3] for name in self.adapter if name.endswith("pte_gate.weight")}
        if gated != ({"o_proj"} if config["output_gate"] else set()):
            raise ValueError(f"gated are {gated}, but output_gate is {config['output_gate']!r}")
        self.caches: list[list[CachedToken]] = [[] for _ in range(hf.num_hidden_layers)]
        self.states: list[ThoughtState | None] = []
        for layer in range(hf.num_hidden_layers):
            start = f"model.layers.{layer}.self_attn.thought_encoder."
            encoder = {
                name.removeprefix(start).removesuffix(".weight"): tensor
                for name, tensor in self.adapter.items()
                if name.startswith(start)
            }
            self.states.append(ThoughtState(encoder, config) if encoder else None)
        if modules and not any(self.states):
            raise ValueError("no layer of the model has a thought encoder")

    def evict(self, prefix: int, count: int) -> None:
        """Drop the `count` oldest thoughts of every layer, each layer's state learning from its own."""
        for cache, state in zip(self.caches, self.states, strict=True):
            leaving = cache[prefix : prefix + count]
            del cache[prefix : prefix + count]
            if state is not None:
                keys = [self.key_to_encode(entry, leaving[0].position) for entry in leaving]
                # [kv_heads, head_dim] -> [d_kv], head after head
                state.write(
                    torch.stack([key.flatten() for key in keys]),
                    torch.stack([entry.value.flatten() for entry in leaving]),
                )

    def key_to_encode(self, entry: CachedToken, first_position: int) -> Tensor:
        """The key without its position, with that in the sequence, or with that in the evicted chunk."""
        if self.encode_keys == "pre_rope":
            return entry.key_pre_rope
        if self.encode_keys == "post_rope":
            return entry.key_post_rope
        return self.rotate(entry.key_pre_rope, entry.position - first_position)

    def step(self, token: int, position: int) -> Tensor:
        """Logits [vocab] after one more token, which enters the caches."""
        hidden = self.weights["model.embed_tokens.weight"][token]
        for layer in range(self.hf.num_hidden_layers):
            hidden = self.block(layer, hidden, position)
        return self.linear("lm_head", self.rms_norm("model.norm", hidden))

    def block(self, layer: int, hidden: Tensor, position: int) -> Tensor:
        """One decoder layer."""
        name = f"model.layers.{layer}"
        if self.hf.model_type == "olmo2":  # normalises what a branch returns, not what it reads
            branch = self.attention(layer, hidden, position)
            hidden = hidden + self.rms_norm(f"{name}.post_attention_layernorm", branch)
            branch = self.mlp(f"{name}.mlp", hidden)
            return hidden + self.rms_norm(f"{name}.post_feedforward_layernorm", branch)
        branch = self.rms_norm(f"{name}.input_layernorm", hidden)
        hidden = hidden + self.attention(layer, branch, position)
        branch = self.rms_norm(f"{name}.post_attention_layernorm", hidden)
        return hidden + self.mlp(f"{name}.mlp", branch)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        """The gated feed-forward branch."""
        if f"{name}.gate_up_proj.weight" in self.weights:  # Phi-3
            gate, up = self.linear(f"{name}.gate_up_proj", x).chunk(2)
        else:
            gate, up = self.linear(f"{name}.gate_proj", x), self.linear(f"{name}.up_proj", x)
        return self.linear(f"{name}.down_proj", F.silu(gate) * up)

    def attention(self, layer: int, x: Tensor, position: int) -> Tensor:
        """The attention branch: the token attends to every cached token and to itself."""
        name, cache, state = f"model.layers.{layer}.self_attn", self.caches[layer], self.states[layer]
        read = None if state is None else state.read()
        query_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        if f"{name}.qkv_proj.weight" in self.weights:  # Phi-3
            fused = self.linear(f"{name}.qkv_proj", x, read)
            query, key, value = fused.split([query_width, kv_width, kv_width])
        else:
            query, key, value = (self.linear(f"{name}.{part}_proj", x, read) for part in "qkv")
        if self.hf.model_type == "olmo2":  # norm over the whole width, all heads together
            query, key = self.rms_norm(f"{name}.q_norm", query), self.rms_norm(f"{name}.k_norm", key)
        query, key, value = (part.view(-1, self.head_dim) for part in (query, key, value))
        if self.hf.model_type == "qwen3":  # norm of each head by itself
            query, key = self.rms_norm(f"{name}.q_norm", query), self.rms_norm(f"{name}.k_norm", key)

        cache.append(CachedToken(position, key, self.rotate(key, position), value))
        query = self.rotate(query, position)
        keys = torch.stack([entry.key_post_rope for entry in cache])  # [stored, kv_heads, head_dim]
        values = torch.stack([entry.value for entry in cache])
        heads = []
        for head in range(self.num_heads):
            kv_head = head // (self.num_heads // self.num_kv_heads)  # neighbours share keys and values
            scores = keys[:, kv_head] @ query[head] * self.head_dim**-0.5
            heads.append(scores.softmax(0) @ values[:, kv_head])
        return self.linear(f"{name}.o_proj", torch.cat(heads), read, x if self.output_reads_input else None)

    def linear(self, name: str, x: Tensor, state: Tensor | None = None, asked: Tensor | None = None) -> Tensor:
        """y = W x (+ bias) + scaling * A S B x, Eq. 5; the last term for adapted projections only.

        `asked`: what the state is asked with, where that is not x. A gate G makes it A (2 sigmoid(G x) * S B x).
        """
        y = F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))
        if state is not None and f"{name}.pte_A.weight" in self.adapter:
            a, b = self.adapter[f"{name}.pte_A.weight"], self.adapter[f"{name}.pte_B.weight"]
            asked = x if asked is None else asked
            answer = state @ (b @ asked)
            if f"{name}.pte_gate.weight" in self.adapter:
                answer = answer * 2 / (1 + torch.exp(-(self.adapter[f"{name}.pte_gate.weight"] @ asked)))
            # The first pattern that is the end of the name, as in LoRA.
            ends = [end for end in self.alpha_pattern if re.search(rf"(^|\.){end}$", name)]
            alpha = self.alpha_pattern[ends[0]] if ends else self.alpha
            y = y + alpha / self.rank * (a @ answer)
        return y

    def rms_norm(self, name: str, x: Tensor) -> Tensor:
        """RMSNorm over the last dimension."""
        variance = x.square().mean(-1, keepdim=True)
        return self.weights[f"{name}.weight"] * x / (variance + self.hf.rms_norm_eps).sqrt()

    def rotate(self, x: Tensor, position: int) -> Tensor:
        """Rotary embedding of x [heads, head_dim]: of its first dimensions where the rotation is partial."""
        angles = position * self.inverse_frequencies
        half = angles.shape[0]
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
