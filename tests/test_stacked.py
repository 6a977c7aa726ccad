"""All layers together: Q and S_0 computed once for all that reads them are those of each layer on its own."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_model, with_adapter
from test_policy import Case, cases, right_padded
from test_training import assert_same, gradients, loss_of

from peft_pte import PTEConfig, sequence_logprobs
from peft_pte.families import attention_modules, find_decoder
from peft_pte.stacked import encoders_of, has_gathered_encoders, stack_encoders, stacked_reading

RULES: list[dict[str, Any]] = [
    dict(),
    dict(num_global_tokens=0),
    dict(state_update="sum"),
    dict(state_update="sum", state_norm="write"),
    dict(state_update="none"),
]


@pytest.mark.parametrize("other", ["", "hook", "dtype", "wrapper"])
@pytest.mark.parametrize("config", RULES, ids=str)
def test_reading_of_all_layers_is_that_of_each(config: dict[str, Any], other: str) -> None:
    """Values and gradients; also where the modules of a layer have to be called, since somebody has changed them."""
    model = with_adapter(tiny_model("llama", num_hidden_layers=3), **config)
    encoders = [encoder for _, encoder in encoders_of(find_decoder(model))]
    module = encoders[1].pte_query["default"]
    if other == "hook":
        module.register_forward_hook(lambda module, args, output: 2 * output)
    elif other == "dtype":
        module.bfloat16()
    elif other == "wrapper":
        encoders[1].pte_query["default"] = torch.nn.Sequential(module)
    parameters = [p for encoder in encoders for p in encoder.parameters()]
    each = [encoder.reading("default") for encoder in encoders]
    found = stacked_reading("default", encoders)
    results = []
    for reading in (tuple(map(torch.stack, zip(*each))), found):
        weights = torch.linspace(0.5, 1.5, reading[0].numel(), dtype=torch.float64).view_as(reading[0])
        total = sum((x.sin() * weights).sum() for x in reading)
        results.append((reading, torch.autograd.grad(total, parameters, allow_unused=True)))
    (expected, expected_gradients), (actual, actual_gradients) = results
    for one, other_one in zip(actual, expected):
        torch.testing.assert_close(one, other_one, rtol=1e-12, atol=1e-12)
    for parameter, one, other_one in zip(parameters, actual_gradients, expected_gradients):
        tolerance = 1e-2 if parameter.dtype == torch.bfloat16 else 1e-12
        assert (one is None) == (other_one is None)
        if one is not None:
            torch.testing.assert_close(one, other_one, rtol=tolerance, atol=tolerance)


def test_encoders_are_found_where_the_layers_are_wrapped_and_where_some_have_none() -> None:
    model = with_adapter(tiny_model("llama", num_hidden_layers=4), layers_to_transform=[0, 2, 3])
    decoder = find_decoder(model)
    expected = [attention for attention in attention_modules(decoder).values() if hasattr(attention, "thought_encoder")]
    assert [attention for attention, _ in encoders_of(decoder)] == expected
    decoder.layers[2] = torch.nn.Sequential(decoder.layers[2])
    assert [attention for attention, _ in encoders_of(decoder)] == expected
    assert all(attention.thought_encoder is encoder for attention, encoder in encoders_of(decoder))


def test_parameters_that_are_gathered_are_noticed() -> None:
    """They carry a mark, or are no parameters of the module while it is not called."""
    model = with_adapter(tiny_model("llama"))
    decoder = find_decoder(model)
    encoder = encoders_of(decoder)[1][1]
    assert not has_gathered_encoders(decoder) and len(stack_encoders(decoder)) == 1
    encoder.pte_value["default"].weight.ds_id = 7
    assert has_gathered_encoders(decoder)
    with model.disable_adapter():
        assert not has_gathered_encoders(decoder) and not stack_encoders(decoder)
    del encoder.pte_value["default"].weight.ds_id
    weight = encoder.pte_query["default"]._parameters.pop("weight")
    encoder.pte_query["default"].weight = weight.detach()
    assert has_gathered_encoders(decoder)


def two_adapters(case: Case, **training: Any) -> torch.nn.Module:
    """Active together: the second has another rank and rule, and is in one of the layers only."""
    model = with_adapter(tiny_model(case.family, seed=case.seed), **case.config, **training)
    config = (
        case.config | training | dict(state_update="sum", state_norm="read", write_gate=False, r=4, num_global_tokens=2)
    )
    config |= dict(layers_to_transform=[1], init_weights=False)
    model.add_adapter("second", PTEConfig(task_type="CAUSAL_LM", **config))
    model.base_model.set_adapter(["default", "second"])
    return model.train()


@settings(max_examples=20)
@given(
    case=cases(),
    training=st.sampled_from([dict(), dict(checkpointing=True), dict(gradient="truncated"), dict(offload=True)]),
    piece=st.sampled_from([1, 3, 128]),
    head=st.booleans(),
)
def test_training_with_all_layers_together_equals_each_on_its_own(
    case: Case, training: dict[str, Any], piece: int, head: bool
) -> None:
    """Of two adapters, with their Q and S_0 read in all segments, recomputed ones too: values and all gradients."""
    options = {name: value for name, value in training.items() if name != "checkpointing"}
    model = two_adapters(case, **options)
    if training.keys() & {"checkpointing", "offload"}:
        model.gradient_checkpointing_enable()
    found = []
    for alone in (True, False):
        with (
            patch("peft_pte.replay.replay.SHORTEST_PIECE", piece),
            patch("peft_pte.replay.replay.has_gathered_encoders", return_value=alone),
        ):
            ids, mask = right_padded(case)
            value = sequence_logprobs(model, ids, mask, case.prompts)[0].sum() if head else loss_of(case, model)
            found.append((value.detach(), gradients(model, value)))
    (expected, expected_gradients), (actual, actual_gradients) = found
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for name in actual_gradients.keys() - expected_gradients.keys():  # zero instead of none
        assert not actual_gradients.pop(name).any()
    if expected_gradients:
        assert_same(actual_gradients, expected_gradients)
