"""Two processes train as one does: DDP and FSDP2 on the CPU, with ranks whose sequences differ in length."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed_jobs import Case, build, configure, generate, loss_of, work
from models import tiny_model
from processes import run_group

from peft_pte import pretrained_config

# Tokens of prompts and of whole rows. With a window of 6 the batches are computed in 8, 3 and 1 segments.
LONG, SHORT, FITS = [(4, 30), (6, 22)], [(5, 14), (3, 12)], [(4, 9), (3, 7)]
SEGMENTS, ONE_EVICTS, MICRO_BATCHES = [[LONG], [SHORT]], [[LONG], [FITS]], [[LONG, FITS], [SHORT, LONG]]
STEPS = [
    (SEGMENTS, "labels", {}),
    (SEGMENTS, "logprobs", dict(num_global_tokens=0)),
    (ONE_EVICTS, "labels", dict(num_global_tokens=0)),  # there the state is zero whatever is trained
    (ONE_EVICTS, "logprobs", dict(state_update="sum", state_norm="write")),
    (ONE_EVICTS, "logprobs", dict(state_update="none")),
    (MICRO_BATCHES, "labels", {}),
    (MICRO_BATCHES, "logprobs", {}),
]


def run(strategy: str, cases: list[Case], folder: Path) -> list[list[dict[str, torch.Tensor]]]:
    """The results of each case on each rank."""
    world = len(cases[0].rows)
    run_group(world, work, folder, strategy, cases)
    return [[torch.load(folder / f"results-{number}-{r}.pt") for r in range(world)] for number in range(len(cases))]


def expected(case: Case) -> dict[str, torch.Tensor]:
    """What one process computes of all rows in one batch."""
    model = build(case)
    loss = loss_of(model, case.all_rows, case)
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()} | {"loss": loss}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("gradient", ["full", "truncated"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_have_the_gradients_of_one(
    strategy: str, gradient: str, checkpointing: bool, tmp_path: Path
) -> None:
    """On every rank all adapter parameters have the gradient of the joined batch, whatever the ranks' numbers of
    segments; the loss without gradients is that of the joined batch too."""
    cases = [Case(rows, loss, checkpointing, config | dict(gradient=gradient)) for rows, loss, config in STEPS]
    for case, ranks in zip(cases, run(strategy, cases, tmp_path)):
        whole = expected(case)
        tolerance = 1e-10 if case.loss == "logprobs" else 1e-5  # transformers' own loss is computed in float32
        scale = max(value.abs().max() for name, value in whole.items() if name != "loss")
        assert scale > 0.01
        for found in ranks:
            assert found.keys() == whole.keys(), case
            for name, value in whole.items():
                error = (found[name] - value).abs().max()
                assert error <= tolerance * (value.abs() if name == "loss" else scale), (name, case)


def test_generate_on_a_sharded_model(tmp_path: Path) -> None:
    """With the method registered for FSDP2 it is as without shards; else it is refused with that advice."""
    run_group(2, generate, tmp_path, [(4, 9), (3, 7)])
    for rank in range(2):
        expected, found, refused = torch.load(tmp_path / f"results-{rank}.pt")
        assert torch.equal(found, expected)
        assert "register_fsdp_forward_method(model, 'generate')" in refused


def test_a_measured_configuration_is_that_of_the_first_process(tmp_path: Path) -> None:
    run_group(2, configure, tmp_path)
    expected = pretrained_config(tiny_model("llama")).alpha_pattern
    assert [torch.load(tmp_path / f"results-{rank}.pt") for rank in range(2)] == [expected] * 2
