"""The engine of examples/evaluate_math.py that is vLLM makes the completions that `generate` makes."""

from __future__ import annotations

import argparse

import pytest
import torch
from engines import random_prompts
from models import tiny_model, with_adapter

from evaluate_engines import VLLM, Generate

Completions = dict[int, tuple[list[int], bool]]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    folder = tmp_path_factory.mktemp("evaluation")
    base = tiny_model("llama", torch.float32, head_dim=32)  # the smallest of vLLM on a CPU
    base.save_pretrained(folder / "base")
    with_adapter(base, window_size=6, eviction_ratio=0.5).save_pretrained(folder / "pte")
    return argparse.Namespace(
        model=str(folder / "base"),
        adapters={"pte": str(folder / "pte")},
        output=folder / "out",
        dtype="float32",
        temperature=0.0,
        top_p=1.0,
        max_new_tokens=40,
        batch_size=4,
        eviction_ratio=None,
    )


@pytest.mark.parametrize("arm, window", [("base", None), ("pte", 8), ("pte", 12)])
def test_completions_are_those_of_generate(options: argparse.Namespace, arm: str, window: int | None) -> None:
    """Also under another window than the adapter's. Two of the tokens end a completion; some do not come to one."""
    prompts, stops = random_prompts([9, 7, 4, 1]), [2, 17]

    def completions(engine: VLLM | Generate) -> Completions:
        found: Completions = {}

        def note(row: int, ids: list[int], ended: bool) -> None:
            assert row not in found
            found[row] = ids, ended

        engine.complete(prompts, 0, note)
        engine.close()
        return found

    generate = Generate(arm, options, stops)
    generate.window = window
    expected = completions(generate)
    assert completions(VLLM(arm, window, options, stops, longest=9)) == expected
    assert len(expected) == 4 and {ended for _, ended in expected.values()} == {True, False}
