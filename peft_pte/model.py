"""`PTEModel`: puts the adapter into a Hugging Face model and takes it out again."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import get_pattern_key
from torch import nn

from .config import PTEConfig
from .encoder import ENCODER_NAME, ThoughtEncoder
from .families import FUSED_PROJECTION, SPLIT_PROJECTIONS, attention_modules, find_decoder, kv_width
from .hooks.attach import attach, attach_encoder, detach
from .layer import Linear, PTELayer, base_layer_of, refuse_merge, widths_of
from .start import start_as_attention


class PTEModel(BaseTuner):
    """
    Creates a model with Progressive Thought Encoding from a pretrained decoder-only transformers model.

    Every attention layer gets a [`ThoughtEncoder`], and its projections become [`Linear`] layers with
    `y = W x + scaling * A S B x`, where the state `S` belongs to one sequence. The KV cache is bounded: see
    [`PTEConfig`].

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to be adapted.
        peft_config ([`PTEConfig`]): The configuration.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.

    Returns:
        `torch.nn.Module`: The PTE model.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from peft_pte import PTEConfig

        >>> base = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-3B-Instruct")
        >>> model = get_peft_model(base, PTEConfig(task_type="CAUSAL_LM", window_size=1024))
        >>> model.generate(**inputs, max_new_tokens=65536)  # constant memory
        ```
    """

    prefix: str = "pte_"
    tuner_layer_cls = PTELayer
    target_module_mapping: dict[str, list[str]] = {}  # found by structure: see _prepare_adapter_config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, not its `forward` as PEFT before 0.21 did: the hooks on it find the prompt border."""
        return self.model(*args, **kwargs)

    # ------------------------------------------------------------------------------------------------------- injection

    def _prepare_adapter_config(self, peft_config: PTEConfig, model_config: dict) -> PTEConfig:
        """Default targets: all linear projections of the attention modules.

        Those that we know by name are among them even if they are no linear layers, so that `_prepare_model` refuses
        them instead of adapting the rest.
        """
        attentions = attention_modules(find_decoder(self.model)).values()
        if peft_config.target_modules is None:
            peft_config.target_modules = {
                name
                for attention in attentions
                for name, child in attention.named_children()
                if is_linear(child) or name in (*SPLIT_PROJECTIONS, FUSED_PROJECTION)
            }
        return peft_config

    def _prepare_model(self, peft_config: PTEConfig, model: nn.Module) -> None:
        """Check every target before the first one is replaced, so that a refusal leaves the model as it was."""
        decoder = find_decoder(model)
        if peft_config.target_modules == "all-linear":
            raise ValueError(
                "PTEConfig: `target_modules` is 'all-linear', but PTE adapts attention projections only: the thought "
                "state belongs to an attention layer. Leave `target_modules` out to adapt all of them."
            )
        attentions = set(attention_modules(decoder).values())
        layers = [module for module in model.modules() if isinstance(module, PTELayer)]
        of_other_adapters = {part for layer in layers for part in layer.modules() if part is not layer}
        of_other_adapters |= {layer for layer in layers if isinstance(layer, ThoughtEncoder)}
        reads_state, unmatched = False, set(peft_config.alpha_pattern)
        for key, module in model.named_modules():
            if not key or module in of_other_adapters or not self._check_target_module_exists(peft_config, key):
                continue
            parent = model.get_submodule(key.rpartition(".")[0])
            if parent not in attentions:
                raise ValueError(
                    f"PTEConfig: `target_modules` matches '{key}', which is not a projection of an attention module. "
                    "PTE adapts attention projections only: leave `target_modules` out to adapt all of them."
                )
            if not is_linear(module):
                raise ValueError(
                    f"PTEConfig: `target_modules` matches '{key}', a {type(base_layer_of(module)).__name__}, which "
                    "PTE cannot adapt: it is no linear layer (also quantised, or wrapped) that says its `in_features` "
                    "and `out_features`."
                )
            unmatched.discard(get_pattern_key(list(peft_config.alpha_pattern), key))
            reads_state |= hidden_size_at(parent, key.rpartition(".")[2]) is not None
        if unmatched:
            raise ValueError(
                f"PTEConfig: `alpha_pattern` has {sorted(unmatched)}, which is the first pattern of no adapted "
                "projection of this model: use names such as 'o_proj' or 'layers.3.self_attn.o_proj'."
            )
        if peft_config.init_weights == "attention" and not reads_state:
            raise ValueError(
                "PTEConfig: `init_weights` is 'attention', which is how an output projection starts, but "
                f"`target_modules` is {peft_config.target_modules!r}, without one: add it, or use init_weights=True."
            )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; an adapter of this name that is there already (a notebook's cell run twice) is replaced whole."""
        old = [layer for layer in model.modules() if isinstance(layer, PTELayer) and layer.has_adapter(adapter_name)]
        self._outdated = set(old)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            for layer in self._outdated:  # is no target any more
                layer.delete_adapter(adapter_name)
        finally:
            del self._outdated

    def _create_and_replace(
        self,
        peft_config: PTEConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, ThoughtEncoder):
            return  # a regular expression that matches all of the attention module; the projections bring the encoder
        attachment = getattr(self.model, "pte_attachment", None)
        if attachment is None:
            attachment = attach(self.model, find_decoder(self.model))
        attachment.configs[adapter_name] = peft_config
        encoder = parent._modules.get(ENCODER_NAME)
        if encoder is None:
            encoder = ThoughtEncoder(base_layer_of(target), adapter_name, kv_width(parent))
            encoder.set_adapter(self.active_adapters)
            attach_encoder(attachment, parent, encoder)
        if adapter_name not in encoder.pte_rule or encoder in self._outdated:
            self._outdated.discard(encoder)
            encoder.update_layer(adapter_name, peft_config)
            if adapter_name not in self.active_adapters:
                encoder.set_requires_grad(adapter_name, False)
        if isinstance(target, Linear):
            self._outdated.discard(target)
            target.update_layer(adapter_name, peft_config, current_key)
            projection = target
        else:
            projection = Linear(target, adapter_name, peft_config, current_key, hidden_size_at(parent, target_name))
            if adapter_name not in self.active_adapters:
                projection.requires_grad_(False)
            self._replace_module(parent, target_name, projection, target)
        is_start = peft_config.init_weights == "attention" and not peft_config.inference_mode  # that is to be loaded
        if is_start and projection.hidden_size is not None:
            start_as_attention(parent, projection, adapter_name, refuse=not peft_config.was_saved)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Only that: new layers are on their device already, and they and the unloaded ones have their weights.

        PEFT's default assigns the child's weight, which on unload fails with `trainable_token_indices`.
        """
        setattr(parent, child_name, new_module)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from all layers."""
        super().delete_adapter(adapter_name)
        self.model.pte_attachment.configs.pop(adapter_name, None)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            refuse_merge()
        if hasattr(self.model, "pte_attachment"):
            detach(self.model.pte_attachment)
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)

    # -------------------------------------------------------------------------------------------------------- refusals

    _check_merge_allowed = refuse_merge
    merge_adapter = refuse_merge
    unmerge_adapter = refuse_merge
    add_weighted_adapter = refuse_merge

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any):
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "PTE does not support `adapter_names` (a batch with a different adapter for each row): all rows of a "
                "cache share one policy. Use `set_adapter` and one batch for each adapter."
            )
        yield


def hidden_size_at(attention: nn.Module, projection: str) -> int | None:
    """The width of an attention module's input, for a projection that reads something else; else None."""
    readers = [name for name in (*SPLIT_PROJECTIONS, FUSED_PROJECTION) if hasattr(attention, name)]
    if projection in readers:
        return None
    widths = widths_of(base_layer_of(getattr(attention, readers[0])))
    return None if widths is None else widths[0]


def is_linear(module: nn.Module) -> bool:
    """A linear layer, adapted already or not, quantised or not; not the encoder, whose base layer is a sibling."""
    return not isinstance(module, ThoughtEncoder) and widths_of(base_layer_of(module)) is not None
