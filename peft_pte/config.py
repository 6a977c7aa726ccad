"""`PTEConfig`: every choice of the method, validated."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, Union

from peft.config import PeftConfig
from peft.utils import PeftType
from peft.utils.other import get_pattern_key

from .model_card import CARD, add_loading_code


class CachePolicy(NamedTuple):
    """The part of a configuration that decides what is in the KV cache; adapters active together must agree on it."""

    window_size: Union[int, Literal["prompt"]]
    eviction_ratio: float
    eviction_policy: str
    retained_prefix: Union[int, Literal["prompt"]]
    gradient: str
    offload: bool

    def prefix(self, prompt_length: int) -> int:
        """How many columns are never evicted, if the prompt has so many."""
        return prompt_length if self.retained_prefix == "prompt" else self.retained_prefix

    def window(self, prompt_length: int) -> int:
        """How many thoughts stay, if the longest prompt has so many tokens."""
        return max(1, prompt_length) if self.window_size == "prompt" else self.window_size


@dataclass
class PTEConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of a [`PTEModel`].

    Progressive Thought Encoding (https://arxiv.org/abs/2602.16839) trains and decodes under a KV cache of fixed size.
    Thoughts that leave the cache are encoded into a state `S` per sequence and attention layer, which acts as a
    dynamic low-rank weight update: `y = W x + scaling * A S B x`.

    Args:
        r (`int`):
            Rank: `A` is `[out, r]`, `S` is `[r, r]`, `B` is `[r, in]`. The state holds about `r` independent facts a
            layer, so choose it by what must be remembered; 32 is the paper's value.
        num_global_tokens (`int`):
            Number G of learned tokens that make the initial state `S_0` (Eq. 6). With 0 there is no initial state and
            the adapter acts only after the first eviction. 64 was worse than 32 in the paper.
        pte_alpha (`float`):
            The update is scaled by `pte_alpha / r`, as in LoRA. Half of `r` trained in more cases than `r`, which can
            make gradients explode, though more slowly where both do; see docs/evidence_first_design.md. `paper()` takes
            `r`.
        alpha_pattern (`dict[str, float]`):
            As in LoRA: other alphas of projections, by name, or by a regular expression that matches its end, such as
            `layers\\.3\\.self_attn\\.o_proj`.
        pte_dropout (`float`):
            Dropout on the input of `B`. It is active in rollouts too if the model is in train mode.
        window_size (`int` or `"prompt"`):
            Number C of evictable thought tokens that stay in the cache; the retained prefix is kept beside them.
            `"prompt"` takes the length of the longest prompt of the batch, as the paper does in training. Note that
            it makes a row depend on the batch it is in.
        eviction_ratio (`float`):
            Share of the window that leaves at once: `max(1, floor(C * eviction_ratio))` thoughts. 0.25 is the paper's
            value. Smaller values keep more context at the price of more frequent, shorter steps in training.
        eviction_policy (`str`):
            Which thoughts leave. `"sliding_window"`: the oldest.
        retained_prefix (`"prompt"` or `int`):
            `"prompt"`: the prompt is never evicted. An integer k: only the first k tokens of a row are kept for ever
            and the rest of the prompt streams through the window as thoughts do, for prompts longer than memory allows.
        state_update (`"delta"`, `"sum"` or `"none"`):
            How evicted keys and values enter the state. `"sum"` is the paper's rule (Eq. 3 and 4); `"delta"` corrects
            what is stored under a key instead of adding to it, and goes beyond the paper; `"none"` never writes, so
            that only the global tokens act (an ablation).
        state_norm (`"bound"`, `"read"`, `"write"`, `"none"` or `None`):
            When the state is normalised. `"write"`: after every write (Eq. 4 to the letter; sum only). `"read"`: the
            raw sum is kept and normalised when it is used. `"bound"`: what was written is kept raw and its rows are
            bounded when it is used: `q / sqrt(1 + |q|^2 / 4)`, so short rows stay as they are, and no row gets longer
            than 2. `"none"`: never; keys and values that depend on the state are written into it, and over long
            thinking it may grow without limit. `None` takes `"bound"` for delta and `"read"` otherwise.
        state_norm_type (`"row"` or `"frobenius"`):
            For `"read"` and `"write"`: rows of unit L2 norm, or unit root-mean-square row norm over the whole matrix.
        conv_size (`int` or `None`):
            Width c of a short causal convolution over the projected keys that are written: every token goes under its
            own key plus those of the `c - 1` tokens before it, by weights for each channel that are learned from zero
            on. (What belongs together in text is neighbours: a value stands behind its key.) The last `c - 1` projected
            keys become a part of what a sequence carries. 1: off. `None` takes 2 for delta and 1 otherwise.
        write_gate (`bool`):
            Delta rule only: whether a token says how far it is written. Its key `k` (before it is scaled to unit
            length) is written with the strength `beta = 2 sigmoid(g k)`, where `g` [r] starts at zero and so every
            strength at one. Near zero a token leaves the state as it is; that of text between facts can be learned.
        output_source (`"hidden_states"`, `"attention_output"` or `None`):
            What `x` is in `A S B x` at the attention module's output projection. `"hidden_states"`: the module's input,
            as for q, k and v, so that what the state answers goes straight to the module's output.
            `"attention_output"`: the projection's own input, as in the paper, so that the answer to a question waits
            for an attention head that carries the question. `None` takes `"hidden_states"`.
        output_gate (`bool` or `None`):
            Whether what is read at the output projection is gated by what it is asked with, channel by channel:
            `A (2 sigmoid(G x) * S B x)`, where `G` [r, in] starts at zero and so every gate at one. (A token that asks
            nothing can then close it.) `None` takes `True` with `output_source="hidden_states"`.
        encode_keys (`"pre_rope"`, `"chunk"` or `"post_rope"`):
            Keys are encoded with their rotary position taken out, relative to the first token of the evicted chunk, or
            as they are in the cache.
        gradient (`"full"` or `"truncated"`):
            `"full"`: exact gradients. `"truncated"`: training in constant memory on the device. Keys and values in the
            cache become constants at each eviction, so a token learns nothing from how later segments attend to it;
            the chain of states keeps its exact gradient (evicted keys and values wait for it in host memory). The
            forward is computed twice, as with gradient checkpointing. (Gradients through a cache that is fed step by
            step, `use_cache=True` without `no_grad`, are always exact.)
        offload (`bool`):
            With `gradient="full"` and gradient checkpointing: what is kept of earlier segments for the backward pass
            (keys, values and states) waits in host memory, pinned if the model is on a GPU.
        target_modules (`Union[list[str], str]`, *optional*):
            The attention projections to adapt. By default all of them (q, k, v, o or the fused ones).
        exclude_modules (`Union[list[str], str]`, *optional*):
            Modules not to adapt, as in PEFT.
        layers_to_transform (`Union[list[int], int]`, *optional*):
            Layer indices to adapt. Layers without an adapter evict too, but do not encode.
        layers_pattern (`Union[list[str], str]`, *optional*):
            Name of the layer list, for `layers_to_transform`.
        modules_to_save (`list[str]`, *optional*):
            Further modules to train and save in full.
        trainable_token_indices (`Union[list[int], dict[str, list[int]]]`, *optional*):
            Embedding rows to train, as in PEFT.
        init_weights (`bool` or `"attention"`):
            `True`: `A` starts at zero, so that the adapted model starts as the base model with a bounded cache.
            `"attention"`: that too, and the state of an output projection is asked, and written, as the base's
            attention asks keys: `B`, `W_K` and `Q` start from the `r` strongest pairs of directions of `W_q^T W_k`
            (`start.py`) instead of random ones. For pretrained models, on which facts are learned sooner; needs
            `state_update="delta"` and `output_source="hidden_states"`.
            `False`: random `A`, and a random convolution, for tests.

    Example:

    ```py
    >>> from transformers import AutoModelForCausalLM
    >>> from peft import get_peft_model
    >>> from peft_pte import PTEConfig

    >>> base = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-3B-Instruct")
    >>> model = get_peft_model(base, PTEConfig(task_type="CAUSAL_LM", window_size=1024))
    ```
    """

    r: int = field(default=32, metadata={"help": "Rank: the state is [r, r]."})
    num_global_tokens: int = field(
        default=32, metadata={"help": "Number of learned tokens that make the initial state; 0 means S_0 = 0."}
    )
    pte_alpha: float = field(default=16, metadata={"help": "The update is scaled by pte_alpha / r."})
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Projections with another alpha, by name or regular expression."}
    )
    pte_dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the input of B."})
    window_size: Union[int, Literal["prompt"]] = field(
        default=1024,
        metadata={"help": "Evictable thought tokens kept in the cache, or 'prompt': the longest prompt's length."},
    )
    eviction_ratio: float = field(default=0.25, metadata={"help": "Share of the window that is evicted at once."})
    eviction_policy: Literal["sliding_window"] = field(
        default="sliding_window", metadata={"help": "Which thoughts leave the cache: the oldest."}
    )
    retained_prefix: Union[int, Literal["prompt"]] = field(
        default="prompt",
        metadata={"help": "'prompt': the prompt is never evicted; int k: only the first k tokens are kept for ever."},
    )
    state_update: Literal["delta", "sum", "none"] = field(
        default="delta", metadata={"help": "How evicted thoughts enter the state; 'sum' is the paper's rule."}
    )
    state_norm: Optional[Literal["bound", "read", "write", "none"]] = field(
        default=None, metadata={"help": "When the state is normalised. Default: 'bound' for delta, else 'read'."}
    )
    state_norm_type: Literal["row", "frobenius"] = field(
        default="row", metadata={"help": "Unit rows, or the whole matrix scaled to unit root-mean-square row norm."}
    )
    conv_size: Optional[int] = field(
        default=None, metadata={"help": "Width of the convolution over encoded keys. Default: 2 for delta, else 1."}
    )
    write_gate: bool = field(
        default=False, metadata={"help": "Tokens learn how far they are written into the state (delta only)."}
    )
    output_source: Optional[Literal["hidden_states", "attention_output"]] = field(
        default=None,
        metadata={"help": "What the state is asked with at the output projection. Default: 'hidden_states'."},
    )
    output_gate: Optional[bool] = field(
        default=None,
        metadata={"help": "Gate what is read at the output projection. Default: with output_source='hidden_states'."},
    )
    encode_keys: Literal["pre_rope", "chunk", "post_rope"] = field(
        default="pre_rope", metadata={"help": "Which positions the encoded keys carry."}
    )
    gradient: Literal["full", "truncated"] = field(
        default="full", metadata={"help": "'truncated' holds cached keys and values constant at segment borders."}
    )
    offload: bool = field(
        default=False, metadata={"help": "Checkpointed segments keep keys, values and states in host memory."}
    )
    target_modules: Optional[Union[list[str], str, set[str]]] = field(
        default=None, metadata={"help": "Attention projections to adapt. Default: all of them."}
    )
    exclude_modules: Optional[Union[list[str], str, set[str]]] = field(
        default=None, metadata={"help": "Modules to exclude from adaptation."}
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None, metadata={"help": "Layer indices to adapt. Default: all."}
    )
    layers_pattern: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Name of the layer list, used with layers_to_transform."}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None, metadata={"help": "Modules apart from the adapter to be trained and saved in full."}
    )
    trainable_token_indices: Optional[Union[list[int], dict[str, list[int]]]] = field(
        default=None, metadata={"help": "Token indices whose embeddings are trained."}
    )
    init_weights: Union[bool, Literal["attention"]] = field(
        default=True,
        metadata={
            "help": "Start as the base model (A = 0). 'attention': and asked as its attention asks keys. False: random "
            "A, for tests."
        },
    )

    def __post_init__(self) -> None:
        self.was_saved = self.peft_version is not None  # only then it is known here
        if self.was_saved:  # by a version that may be older than these fields
            self.conv_size = self.conv_size or 1
            self.output_source = self.output_source or "attention_output"
            self.output_gate = self.output_gate or False
        super().__post_init__()
        self.output_source = self.output_source or "hidden_states"
        self.peft_type = PeftType.PTE
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self.state_norm, self.conv_size, self.output_gate = self.norm, self.num_convolved, self.has_output_gate
        self._validate()

    @classmethod
    def paper(cls, **overrides: Any) -> PTEConfig:
        """The rule and settings of the paper to the letter (Eq. 3 to 6); keyword arguments override single fields."""
        settings: dict[str, Any] = dict(
            r=32,
            pte_alpha=overrides.get("r", 32),
            num_global_tokens=32,
            state_update="sum",
            state_norm="write",
            conv_size=1,
            output_source="attention_output",
            output_gate=False,
            window_size="prompt",
            eviction_ratio=0.25,
            retained_prefix="prompt",
        )
        return cls(**(settings | overrides))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration; as a part of saving a model, the model card too learns how the adapter is loaded."""
        of_model = "auto_mapping_dict" in kwargs  # PEFT passes it then, and has written the card before
        super().save_pretrained(save_directory, **kwargs)
        if of_model:
            folder, base = Path(save_directory), self.base_model_name_or_path
            if (folder / CARD).is_file():
                add_loading_code(folder, base)
            else:  # an adapter with a name of its own lies in a subfolder of the model's
                add_loading_code(folder.parent, base, subfolder=folder.name)

    @property
    def norm(self) -> Literal["bound", "read", "write", "none"]:
        """`state_norm`, or its default."""
        if self.state_norm is not None:
            return self.state_norm
        return "bound" if self.state_update == "delta" else "read"

    @property
    def num_convolved(self) -> int:
        """`conv_size`, or its default."""
        if self.conv_size is not None:
            return self.conv_size
        return 2 if self.state_update == "delta" else 1

    @property
    def has_output_gate(self) -> bool:
        """`output_gate`, or its default."""
        return self.output_source == "hidden_states" if self.output_gate is None else self.output_gate

    @property
    def cache_policy(self) -> CachePolicy:
        """What decides the content of the cache and the path of gradients through it."""
        return CachePolicy(
            self.window_size,
            self.eviction_ratio,
            self.eviction_policy,
            self.retained_prefix,
            self.gradient,
            self.offload,
        )

    def scaling_of(self, projection: str) -> float:
        """By what the update of a projection is multiplied; `projection`: its name in the base model."""
        return self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), projection), self.pte_alpha) / self.r

    def check(self, **changes: Any) -> None:
        """Refuse values that this configuration could not have, with the error that it would be refused with.

        Raises:
            ValueError: names the field, the value and what to do.
        """
        changed = copy.copy(self)
        for name, value in changes.items():
            setattr(changed, name, value)
        changed._validate()

    def _validate(self) -> None:
        def refuse(name: str, advice: str) -> None:
            raise ValueError(f"PTEConfig: `{name}` is {getattr(self, name)!r}, but {advice}")

        def is_int(name: str, minimum: int) -> bool:
            value = getattr(self, name)
            return isinstance(value, int) and not isinstance(value, bool) and value >= minimum

        def is_number(name: str) -> bool:
            value = getattr(self, name)
            return isinstance(value, (int, float)) and not isinstance(value, bool)

        choices = {
            "state_update": ("delta", "sum", "none"),
            "state_norm": ("bound", "read", "write", "none"),
            "state_norm_type": ("row", "frobenius"),
            "encode_keys": ("pre_rope", "chunk", "post_rope"),
            "output_source": ("hidden_states", "attention_output"),
            "gradient": ("full", "truncated"),
            "eviction_policy": ("sliding_window",),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                refuse(name, f"must be one of {', '.join(map(repr, allowed))}.")
        if not is_int("r", 1):
            refuse("r", "must be a positive integer.")
        if not is_int("num_global_tokens", 0):
            refuse("num_global_tokens", "must be an integer >= 0.")
        if not is_int("conv_size", 1):
            refuse("conv_size", "must be a positive integer or None.")
        if not is_number("pte_alpha") or not self.pte_alpha > 0:
            refuse("pte_alpha", "must be a positive number.")
        if not is_alpha_pattern(self.alpha_pattern):
            refuse("alpha_pattern", "must be a dictionary of names, or regular expressions, and positive numbers.")
        if not is_number("pte_dropout") or not 0 <= self.pte_dropout < 1:
            refuse("pte_dropout", "must be in [0, 1).")
        if self.window_size != "prompt" and not is_int("window_size", 1):
            refuse("window_size", "must be a positive integer or 'prompt'.")
        if not is_number("eviction_ratio") or not 0 < self.eviction_ratio <= 1:
            refuse("eviction_ratio", "must be in (0, 1].")
        if self.retained_prefix != "prompt" and not is_int("retained_prefix", 0):
            refuse("retained_prefix", "must be 'prompt' or an integer >= 0.")
        if self.window_size == "prompt" and self.retained_prefix != "prompt":
            refuse(
                "window_size",
                "that needs retained_prefix='prompt': with a prompt that streams through the window, give an integer.",
            )
        if self.state_norm == "write" and self.state_update != "sum":
            refuse("state_norm", "only state_update='sum' is normalised on write; use 'bound', 'read' or 'none'.")
        if self.state_norm == "bound" and self.state_update == "none":
            refuse("state_norm", "with state_update='none' nothing is written that could be bounded: 'read' or 'none'.")
        if self.num_convolved > 1 and self.state_update == "none":
            refuse("conv_size", "with state_update='none' no keys are written: leave it out.")
        if self.write_gate and self.state_update != "delta":
            refuse("write_gate", "only state_update='delta' has strengths of writing: leave it out.")
        if self.state_update == "none" and self.num_global_tokens == 0:
            refuse("num_global_tokens", "with state_update='none' the state would always be zero: use 1 or more.")
        if not isinstance(self.output_gate, bool):
            refuse("output_gate", "must be True, False or None.")
        if not isinstance(self.init_weights, bool) and self.init_weights != "attention":
            refuse("init_weights", "must be True, False or 'attention'.")
        if self.init_weights == "attention" and (self.state_update, self.output_source) != ("delta", "hidden_states"):
            refuse(
                "init_weights",
                "what is asked as attention asks keys is the delta rule's memory at the output projection: "
                "state_update='delta' and output_source='hidden_states', or init_weights=True.",
            )
        for name in ("write_gate", "offload"):
            if not isinstance(getattr(self, name), bool):
                refuse(name, "must be True or False.")
        if self.offload and self.gradient == "truncated":
            refuse("offload", "gradient='truncated' keeps what it needs in host memory anyway: leave it out.")
        if self.layers_pattern and self.layers_to_transform is None:
            refuse("layers_pattern", "has no effect without `layers_to_transform`: give both or neither.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            refuse("layers_to_transform", "cannot be combined with a regular expression in `target_modules`.")


def is_alpha_pattern(value: Any) -> bool:
    try:
        return all(re.compile(key) and type(alpha) in (int, float) and alpha > 0 for key, alpha in value.items())
    except (AttributeError, TypeError, re.error):
        return False
