"""vLLM computes the policy of the package: log-probabilities of the replay, tokens of `generate`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import add, differences, engine, expected, generate, random_prompts, sampling, served_model, step

FAMILIES = ("llama", "qwen2", "qwen3")
BOUND = 1e-4
PAPER = dict(state_update="sum", state_norm="write", conv_size=1, output_source="attention_output", output_gate=False)
# The default and everything that differs from it in what is computed.
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": PAPER,
    "window of the prompt": PAPER | {"window_size": "prompt"},
    "integer prefix": {"retained_prefix": 5},
    "no prefix": {"retained_prefix": 0, "encode_keys": "chunk"},
    "sum": {"state_update": "sum", "state_norm_type": "frobenius", "encode_keys": "post_rope", "output_gate": True},
    "global only": {"state_update": "none", "conv_size": 1, "output_gate": False},
    "some projections": {
        "target_modules": ["q_proj", "o_proj"],
        "conv_size": 4,
        "num_global_tokens": 0,
        "write_gate": True,
    },
    "alphas of projections": {"alpha_pattern": {"k_proj": 1, r"layers\.1\.self_attn\.o_proj": 5}},
    "some layers": {"layers_to_transform": [1], "output_source": "attention_output", "output_gate": True},
}


def random_shape(draw: random.Random, family: str) -> dict[str, Any]:
    """Head dimensions that vLLM's kernels for other layers take, too."""
    num_kv_heads, groups, head_dim = draw.choice([1, 2, 3]), draw.choice([1, 2]), draw.choice([8, 16])
    num_heads = num_kv_heads * groups
    return dict(
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        hidden_size=num_heads * head_dim,
        head_dim=draw.choice([8, 16]) if family == "qwen3" else head_dim,
        num_hidden_layers=draw.choice([2, 3]),
        tie_word_embeddings=draw.choice([True, False]),
    )


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "whole"])
@pytest.mark.parametrize("name", CONFIGS)
def test_log_probabilities_are_those_of_the_replay(name: str, chunked: bool, tmp_path: Path) -> None:
    """Of every sampled token, under ragged prompts and lengths, more requests than seats, several samples of one
    prompt, and one request that goes in the middle."""
    draw = random.Random(f"{name} {chunked}")
    family = draw.choice(FAMILIES)
    window, ratio = draw.randint(8, 64), draw.choice([0.1, 0.25, 0.5, 0.9])
    lengths = [1, 200, *(draw.randint(1, 200) for _ in range(8))]
    draw.shuffle(lengths)
    r = draw.choice([3, 8])
    # With the tests' usual scaling of 8 / r, a random adapter feeds its state back into itself: over hundreds of
    # evictions the package's own float32 is then up to 1e-2 off its float64.
    config = {"window_size": window, "eviction_ratio": ratio, "r": r, "pte_alpha": r} | CONFIGS[name]
    model = served_model(tmp_path, family, 200, seed=draw.randint(0, 999), shape=random_shape(draw, family), **config)
    prompts = random_prompts(lengths, seed=draw.randint(0, 999))

    def completion(length: int) -> int:
        """So many tokens that at least six evictions come before the last one."""
        size = length if config["window_size"] == "prompt" else window
        return size + 6 * max(1, int(size * ratio)) + draw.randint(1, 9)

    # Without a seed of their own, with which vLLM 0.32 fails on a CPU when prompts come in chunks.
    params = [
        sampling(completion(length), temperature=1.0, n=4 if index == 2 else 1) for index, length in enumerate(lengths)
    ]
    options = dict(max_num_batched_tokens=draw.randint(16, 64)) if chunked else dict(max_num_batched_tokens=4096)
    with engine(tmp_path / "served", enable_chunked_prefill=chunked, **options) as llm:
        add(llm, prompts, params)
        finished = step(llm, steps=8)
        aborted = next(index for index in range(len(prompts)) if index not in finished and index != 2)
        llm.llm_engine.abort_request([str(aborted)])
        finished |= step(llm)
    assert sorted(finished) == [index for index in range(len(prompts)) if index != aborted]
    errors = [error for output in finished.values() for error in differences(model, output)]
    print(f"{name}, {family}, {'chunked' if chunked else 'whole'}: {len(errors)} completions, {max(errors):.1e}")
    assert len(errors) == len(prompts) - 1 + 3
    assert max(errors) <= BOUND


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(family: str, tmp_path: Path) -> None:
    """With prompts longer than a chunk, and more requests than seats."""
    model = served_model(tmp_path, family, window_size=8)
    prompts = random_prompts([1, 5, 17, 40, 64, 3])
    with engine(tmp_path / "served", max_num_batched_tokens=16) as llm:
        assert generate(llm, prompts, 40) == expected(model, prompts, 40)


ROTATIONS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_positions_are_taken_out_as_they_were_put_in(name: str, tmp_path: Path) -> None:
    """vLLM rotates, and what is encoded is rotated back by transformers' tables."""
    rope = {"rope_theta": 10000.0, **ROTATIONS[name]}
    model = served_model(tmp_path, window_size=8, shape={"rope_parameters": rope, "max_position_embeddings": 512})
    [prompt] = random_prompts([30])
    with engine(tmp_path / "served", max_model_len=256) as llm:
        add(llm, [prompt], [sampling(60)])
        output = step(llm)[0]
    assert max(differences(model, output)) <= BOUND


def test_half_precision(tmp_path: Path) -> None:
    """Pages hold keys and values in the model's dtype; cores and states stay float32, as those of the package."""
    model = served_model(tmp_path, window_size=9, r=3, pte_alpha=3)
    [prompt] = random_prompts([30])
    with engine(tmp_path / "served", dtype="bfloat16") as llm:
        add(llm, [prompt], [sampling(60)])
        output = step(llm)[0]
        model_under_vllm = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        pages = model_under_vllm.model.layers[0].self_attn.kv_cache
    assert [page.dtype for page in pages] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    model.base_model.model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "pte_" in name:
            parameter.data = parameter.data.float()
    assert BOUND < max(differences(model, output)) <= 0.25


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """Another window, or weights that are a little different, is seen."""
    model = served_model(tmp_path, window_size=8)
    [prompt] = random_prompts([20])
    with engine(tmp_path / "served") as llm:
        add(llm, [prompt], [sampling(40)])
        output = step(llm)[0]
    assert max(differences(model, output)) <= BOUND
    encoder = model.base_model.model.model.layers[0].self_attn.thought_encoder
    with torch.no_grad():
        encoder.pte_key["default"].weight.mul_(1.05)
        encoder.pte_value["default"].weight.mul_(1.05)
    assert max(differences(model, output)) > BOUND
    (tmp_path / "other").mkdir()
    assert max(differences(served_model(tmp_path / "other", window_size=9), output)) > BOUND


def test_prompts_have_log_probabilities_too(tmp_path: Path) -> None:
    """Of an integer prefix, where evictions come in the prompt itself."""
    model = served_model(tmp_path, window_size=8, retained_prefix=3)
    [prompt] = random_prompts([50])
    with engine(tmp_path / "served", max_num_batched_tokens=16) as llm:
        add(llm, [prompt], [sampling(2, prompt_logprobs=0)])
        found = step(llm)[0].prompt_logprobs
    given = torch.tensor([of_token[token].logprob for of_token, token in zip(found[1:], prompt[1:])])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt]), prompt_lengths=1).logits[0]
    replayed = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert float((replayed - given).abs().max()) <= BOUND
