"""What PEFT's other suites ask of a method (custom models, initialisation, tuners, hub, transformers), in our words."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models import relative_error, tiny_model, with_adapter
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM

from peft_pte import PTEConfig, ThoughtEncoder

VOCABULARY, PROMPT = 128, 4
IDS = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
# Twelve thoughts for a window of three: every forward of IDS evicts several times.
EVICTING = dict(window_size=3, eviction_ratio=0.5)
FAMILIES = ["llama", "qwen2", "qwen3"]


def make_base(family: str = "qwen2") -> torch.nn.Module:
    """Always the same weights, in eval mode."""
    return tiny_model(family, torch.float32, vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64)


def make_config(**overrides) -> PTEConfig:
    """The configuration of `make_model`."""
    settings = dict(task_type="CAUSAL_LM", r=4, num_global_tokens=3, pte_alpha=8, init_weights=False)
    return PTEConfig(**(settings | EVICTING | overrides))


def make_model(family: str = "qwen2", seed: int = 1, **config) -> PeftModel:
    return with_adapter(make_base(family), seed, **(dict(r=4) | EVICTING | config))


def make_two(**config) -> PeftModel:
    """Adapters "default" and "other"; the first is active."""
    model = make_model(**config)
    torch.manual_seed(2)
    model.add_adapter("other", make_config(**config))
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits of the teacher-forced forward under the bounded cache."""
    with torch.no_grad():
        return model(input_ids=IDS, prompt_lengths=PROMPT).logits


def base_logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def generate(model: torch.nn.Module) -> torch.Tensor:
    return model.generate(input_ids=IDS[:, :PROMPT], do_sample=False, max_new_tokens=10, min_new_tokens=10)


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameters_of(model: torch.nn.Module, adapter: str) -> set[str]:
    """Names of the parameters of one adapter."""
    return {name for name, _ in model.named_parameters() if "pte_" in name and f".{adapter}." in name}


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return not torch.allclose(a, b, rtol=1e-3, atol=1e-3)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the last bits: equal weights in memory of other alignment differ there."""
    assert relative_error(actual, expected) <= 1e-4


def assert_is_base(model: torch.nn.Module, family: str = "qwen2") -> None:
    """The model is the base model again: bit for bit, and nothing is left on it."""
    base = make_base(family)
    assert torch.equal(base_logits(model), base_logits(base))
    assert torch.equal(generate(model), generate(base))
    assert dict(model.named_parameters()).keys() == dict(base.named_parameters()).keys()
    for module, original in zip(model.modules(), base.modules(), strict=True):
        assert type(module) is type(original)
        assert module.__dict__.keys() == original.__dict__.keys()
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._forward_hooks_always_called and not module._forward_pre_hooks_with_kwargs


# ------------------------------------------------------------------------------------------------------- requires_grad


def test_only_the_active_adapter_is_trainable() -> None:
    model = make_two()
    both = parameters_of(model, "default") | parameters_of(model, "other")
    assert len(both) == 2 * 2 * (4 * 2 + 1 + 6)  # layers x (A, B of q, k, v, o; o's gate; six of the encoder)
    assert trainable(model) == parameters_of(model, "default")
    model.set_adapter("other")
    assert trainable(model) == parameters_of(model, "other")
    model.set_adapter("default")
    assert trainable(model) == parameters_of(model, "default")
    model.base_model.set_adapter(["default", "other"])
    assert trainable(model) == both


def test_third_adapter_does_not_change_who_is_trainable() -> None:
    model = make_two()
    model.set_adapter("other")
    model.add_adapter("third", make_config())
    assert trainable(model) == parameters_of(model, "other")
    assert model.active_adapters == ["other"]


def test_requires_grad_by_hand() -> None:
    model = make_two()
    model.set_requires_grad("default", False)
    assert trainable(model) == set()
    model.set_requires_grad(["default", "other"])
    assert trainable(model) == parameters_of(model, "default") | parameters_of(model, "other")


def test_set_adapter_in_inference_mode() -> None:
    model = make_two()
    model.set_adapter("other", inference_mode=True)
    assert model.active_adapters == ["other"] and trainable(model) == set()


def test_disabling_comes_back_to_what_was_trainable() -> None:
    model = make_two()
    model.set_adapter("other")
    with model.disable_adapter():
        assert trainable(model) == set()
    assert trainable(model) == parameters_of(model, "other")


def test_inference_adapter_stays_frozen_after_disabling(tmp_path: Path) -> None:
    """huggingface/peft#3447: enabling again made an adapter loaded for inference trainable."""
    make_model().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make_base(), tmp_path)
    assert trainable(model) == set()
    for _ in range(2):
        with model.disable_adapter():
            pass
        assert trainable(model) == set()
    model.load_adapter(tmp_path, "to_train", is_trainable=True)
    model.set_adapter("to_train")
    with model.disable_adapter():
        pass
    assert trainable(model) == parameters_of(model, "to_train")


def test_every_adapter_parameter_gets_a_gradient_and_no_other() -> None:
    model = make_two()
    model(input_ids=IDS, prompt_lengths=PROMPT, labels=IDS).loss.backward()
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert touched == parameters_of(model, "default")
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if name in touched)


# ---------------------------------------------------------------------------------------------------- several adapters


def test_adapters_do_not_disturb_each_other() -> None:
    model = make_model()
    default = logits(model)
    model.add_adapter("other", make_config())
    assert torch.equal(logits(model), default)
    model.set_adapter("other")
    assert differ(logits(model), default)
    model.set_adapter("default")
    assert torch.equal(logits(model), default)


def test_adapters_of_different_ranks_and_targets() -> None:
    model = make_model()
    model.add_adapter("other", make_config(r=7, num_global_tokens=0, target_modules=["v_proj"], layers_to_transform=1))
    default = logits(model)
    model.set_adapter("other")
    other = logits(model)
    assert differ(other, default)
    encoders = [module for module in model.modules() if isinstance(module, ThoughtEncoder)]
    assert ["other" in encoder.pte_rule for encoder in encoders] == [False, True]
    assert trainable(model) == parameters_of(model, "other")
    model.set_adapter("default")
    assert torch.equal(logits(model), default)


def test_active_together_both_contribute() -> None:
    model = make_two()
    default = logits(model)
    model.set_adapter("other")
    other = logits(model)
    model.base_model.set_adapter(["default", "other"])
    together = logits(model)
    assert differ(together, default) and differ(together, other)
    model(input_ids=IDS, prompt_lengths=PROMPT, labels=IDS).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.requires_grad)
    with torch.no_grad():  # without its A an adapter adds nothing, so the other one remains
        for name, parameter in model.named_parameters():
            if "pte_A.other." in name:
                parameter.zero_()
    assert_same(logits(model), default)
    tokens = generate(model)
    model.set_adapter("default")
    assert torch.equal(generate(model), tokens)


def test_active_together_with_different_caches_is_refused() -> None:
    model = make_model()
    model.add_adapter("other", make_config(window_size=5))
    model.base_model.set_adapter(["default", "other"])
    for act in (logits, generate):
        with pytest.raises(ValueError, match="active adapters want different caches.*window_size=5"):
            act(model)
    model.set_adapter("other")
    logits(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_second_adapter_with_a_regular_expression(family: str) -> None:
    """It matches the thought encoder of the first adapter too, which is no target."""
    config = dict(target_modules=r".*self_attn\.(?!.*norm).*")
    model = make_model(family, **config)
    model.add_adapter("other", make_config(**config))
    assert {name.replace(".other.", ".default.") for name in parameters_of(model, "other")} == parameters_of(
        model, "default"
    )


def test_second_adapter_takes_the_same_default_targets() -> None:
    model = make_two()
    assert model.peft_config["other"].target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert model.peft_config["other"].target_modules == model.peft_config["default"].target_modules


# ----------------------------------------------------------------------------------------------------- deleting, unload


@pytest.mark.parametrize("family", FAMILIES)
def test_deleting_adapters(family: str) -> None:
    model = make_model(family)
    default = logits(model)
    model.add_adapter("other", make_config())
    model.set_adapter("other")
    model.delete_adapter("other")
    assert model.active_adapters == ["default"] and not parameters_of(model, "other")
    assert torch.equal(logits(model), default)
    model.delete_adapter("default")
    assert not parameters_of(model, "default") and trainable(model) == set()
    left = model.base_model.model  # PEFT's own wrapper cannot be called without any adapter
    assert torch.equal(base_logits(left), base_logits(make_base(family)))
    assert torch.equal(generate(left), generate(make_base(family)))


def test_deleted_name_can_be_used_again() -> None:
    model = make_two()
    expected = logits(model)
    model.delete_adapter("other")
    model.add_adapter("other", make_config(r=6, window_size=5))
    model.set_adapter("other")
    assert differ(logits(model), expected)
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_unload_restores_the_base_bit_for_bit(family: str) -> None:
    model = make_model(family)
    assert differ(logits(model), base_logits(make_base(family)))
    generate(model)
    assert_is_base(model.unload(), family)


def test_unload_with_several_adapters_and_wrapping_again() -> None:
    model = make_two()
    expected = logits(model)
    base = model.unload()
    assert_is_base(base)
    assert torch.equal(logits(with_adapter(base, 1, r=4, **EVICTING)), expected)


def test_disabled_is_the_base_bit_for_bit() -> None:
    model, base = make_two(), make_base()
    expected = logits(model)
    with model.disable_adapter():
        assert torch.equal(base_logits(model), base_logits(base))
        assert torch.equal(generate(model), generate(base))
    assert torch.equal(logits(model), expected)


# ------------------------------------------------------------------------------------------------------ saving, loading


def test_state_dict_under_another_name() -> None:
    model = make_two()
    weights = get_peft_model_state_dict(model)
    assert not any("default" in key for key in weights)
    other = get_peft_model_state_dict(model, adapter_name="other")
    expected = logits(model)
    result = set_peft_model_state_dict(model, weights, adapter_name="other")
    assert not result.unexpected_keys and not any(".other." in key for key in result.missing_keys)
    assert torch.equal(logits(model), expected)
    model.set_adapter("other")
    assert torch.equal(logits(model), expected)
    assert weights.keys() == other.keys() and len(weights) == len(parameters_of(model, "other"))


def test_selected_adapters_are_saved(tmp_path: Path) -> None:
    model = make_two()
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert (tmp_path / "other" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter_model.safetensors").exists()
    model.set_adapter("other")
    loaded = PeftModel.from_pretrained(make_base(), tmp_path / "other", adapter_name="again")
    assert_same(logits(loaded), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_low_cpu_mem_usage(tmp_path: Path, family: str) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(family), tmp_path, low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    for name in ("default", "second"):
        loaded.set_adapter(name)
        assert_same(logits(loaded), logits(model))


def test_injection_on_the_meta_device() -> None:
    weights = get_peft_model_state_dict(make_model())
    base = inject_adapter_in_model(make_config(), make_base(), low_cpu_mem_usage=True)
    assert {parameter.is_meta for name, parameter in base.named_parameters() if "pte_" in name} == {True}
    set_peft_model_state_dict(base, weights, low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in base.parameters())
    assert_same(logits(base.eval()), logits(make_model()))


def test_auto_class(tmp_path: Path) -> None:
    make_base().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = with_adapter(base, 1, r=4, **EVICTING)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    assert_same(logits(loaded), logits(model))
    assert torch.equal(generate(loaded), generate(model))


def test_config_from_its_type() -> None:
    assert type(PeftConfig.from_peft_type(peft_type="PTE")) is PTEConfig
    assert type(PeftConfig.from_peft_type(peft_type=PeftType.PTE, r=3)) is PTEConfig


# ------------------------------------------------------------------------------------------- other trained parameters


def test_modules_to_save(tmp_path: Path) -> None:
    model = make_model(modules_to_save=["lm_head"])
    head = model.get_output_embeddings()
    assert {name for name in trainable(model) if "pte_" not in name} == {
        "base_model.model.lm_head.modules_to_save.default.weight"
    }
    with torch.no_grad():
        head.modules_to_save["default"].weight.mul_(-1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path)
    assert_same(logits(loaded), logits(model))
    with loaded.disable_adapter():
        assert torch.equal(base_logits(loaded), base_logits(make_base()))
    base = loaded.unload()  # as PEFT does it, a fully trained module stays
    assert torch.equal(base_logits(base), -base_logits(make_base()))


def test_trainable_token_indices(tmp_path: Path) -> None:
    rows = IDS[0, :2].tolist()
    model = make_model(trainable_token_indices=rows)
    before = logits(model)
    (delta,) = (p for name, p in model.named_parameters() if "trainable_tokens_delta" in name)
    assert delta.requires_grad and delta.shape == (2, 64)
    with torch.no_grad():
        delta.mul_(-1)
    assert differ(logits(model), before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path)
    assert_same(logits(loaded), logits(model))
    with loaded.disable_adapter():
        assert torch.equal(base_logits(loaded), base_logits(make_base()))
    assert_is_base(loaded.unload())


# -------------------------------------------------------------------------------------------------------- introspection


def test_layer_status() -> None:
    model = make_two()
    layers = get_layer_status(model)
    assert [status.name for status in layers[:5]] == [
        "model.model.layers.0.self_attn." + name for name in ("q_proj", "k_proj", "v_proj", "o_proj", "thought_encoder")
    ]
    assert [status.module_type for status in layers[:5]] == ["pte.Linear"] * 4 + ["pte.ThoughtEncoder"]
    for status in layers:
        assert status.enabled and status.active_adapters == ["default"] and status.merged_adapters == []
        assert status.available_adapters == ["default", "other"]
        assert status.requires_grad == {"default": True, "other": False}
        assert status.devices == {"default": ["cpu"], "other": ["cpu"]}


def test_model_status() -> None:
    model = make_two()
    status = get_model_status(model)
    assert status.base_model_type == "Qwen2ForCausalLM" and status.adapter_model_type == "PTEModel"
    assert status.peft_types == {"default": "PTE", "other": "PTE"}
    assert status.num_adapter_layers == 2 * 5
    assert status.enabled is True and status.active_adapters == ["default"] and status.merged_adapters == []
    assert status.requires_grad == {"default": True, "other": False}
    assert status.trainable_params == model.get_nb_trainable_parameters()[0] > 0
    with model.disable_adapter():
        assert get_model_status(model).enabled is False
    model.set_adapter("other")
    assert get_model_status(model).active_adapters == ["other"]


# --------------------------------------------------------------------------------------- transformers' own entry points


def transformers_refuses_this_peft() -> bool:
    """transformers 5.24 loads adapters of any kind, but wants PEFT 0.22, which is not out yet, for all else."""
    try:
        make_base().add_adapter(LoraConfig(target_modules=["q_proj"]))
    except ValueError as refusal:
        return "The version of PEFT you are using is not compatible" in str(refusal)
    return False


def test_transformers_integration(tmp_path: Path) -> None:
    """`model.add_adapter` and relatives, without a `PeftModel` around."""
    if transformers_refuses_this_peft():
        peft_model, model = make_model(), make_base()
        peft_model.save_pretrained(tmp_path)
        model.load_adapter(tmp_path)
        assert_same(logits(model), logits(peft_model))
        with pytest.raises(ValueError, match="version of PEFT"):
            model.set_adapter("default")
        return
    expected = {}
    for seed, name in ((1, "first"), (2, "second")):
        peft_model = make_model(seed=seed)
        peft_model.save_pretrained(tmp_path / name)
        expected[name] = logits(peft_model), generate(peft_model)
    model = make_base()
    for name in expected:
        model.load_adapter(tmp_path / name, name)
    for name, (want, tokens) in expected.items():
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        assert_same(logits(model), want)
        assert torch.equal(generate(model), tokens)
    model.disable_adapters()
    assert torch.equal(base_logits(model), base_logits(make_base()))
    assert torch.equal(generate(model), generate(make_base()))
    model.enable_adapters()
    assert_same(logits(model), expected["second"][0])
    model.delete_adapter("second")
    model.set_adapter("first")
    assert_same(logits(model), expected["first"][0])
    model.delete_adapter("first")
    assert torch.equal(base_logits(model), base_logits(make_base()))
    assert torch.equal(generate(model), generate(make_base()))
    assert not any("pte_" in name for name, _ in model.named_parameters())


def test_transformers_add_adapter_saves_and_loads(tmp_path: Path) -> None:
    if transformers_refuses_this_peft():
        with pytest.raises(ValueError, match="version of PEFT"):
            make_base().add_adapter(make_config(), "mine")
        return
    model = make_base()
    torch.manual_seed(1)
    model.add_adapter(make_config(), "mine")
    model.eval()
    assert parameters_of(model, "mine") and trainable(model) >= parameters_of(model, "mine")
    assert differ(logits(model), base_logits(make_base()))
    model.save_pretrained(tmp_path)
    loaded = make_base()
    loaded.load_adapter(tmp_path, "again")
    assert_same(logits(loaded), logits(model))
    assert trainable(loaded) & parameters_of(loaded, "again") == set()
    wrapped = PeftModel.from_pretrained(make_base(), tmp_path)
    assert_same(logits(wrapped), logits(model))


def test_without_task_type() -> None:
    """A plain `PeftModel` calls the model and its `generate` just so."""
    base = make_base()
    torch.manual_seed(1)
    model = get_peft_model(base, make_config(task_type=None)).eval()
    assert type(model) is PeftModel
    assert_same(logits(model), logits(make_model()))
    assert torch.equal(generate(model), generate(make_model()))


# --------------------------------------------------------------------------------------------------------------- copies


def test_deepcopy_is_independent() -> None:
    model = make_model()
    expected, tokens = logits(model), generate(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected) and torch.equal(generate(twin), tokens)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    changed = logits(twin)
    assert differ(changed, expected)
    assert torch.equal(logits(model), expected) and torch.equal(generate(model), tokens)
    with model.disable_adapter():
        assert torch.equal(logits(twin), changed)
    assert_is_base(twin.unload())
    assert torch.equal(logits(model), expected) and torch.equal(generate(model), tokens)
    second = copy.deepcopy(model)
    assert_is_base(model.unload())
    assert torch.equal(logits(second), expected) and torch.equal(generate(second), tokens)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_and_unload(safe_merge=True, adapter_names=["default"]),
        lambda model: model.merge_adapter(),
        lambda model: model.unmerge_adapter(),
        lambda model: model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mixed"),
        lambda model: model.base_model.model.model.layers[0].self_attn.q_proj.merge(),
    ],
)
def test_merging_is_refused_and_changes_nothing(call) -> None:
    model = make_two()
    expected = logits(model)
    with pytest.raises(NotImplementedError, match="PTE cannot be merged into the base weights"):
        call(model)
    assert torch.equal(logits(model), expected) and sorted(model.peft_config) == ["default", "other"]


@pytest.mark.parametrize("method", ["__call__", "forward", "generate"])
def test_adapter_names_are_refused(method: str) -> None:
    model = make_two()
    with pytest.raises(ValueError, match="PTE does not support `adapter_names`"):
        getattr(model, method)(input_ids=IDS[:, :PROMPT], adapter_names=["default", "other"])
    logits(model)


def test_reentrant_checkpointing_is_refused() -> None:
    model = make_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="does not support reentrant gradient checkpointing"):
        model(input_ids=IDS, prompt_lengths=PROMPT, labels=IDS)
