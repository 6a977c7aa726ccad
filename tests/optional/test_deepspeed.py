"""DeepSpeed's ZeRO-3 on two processes computes what one does; needs `pip install -e ".[deepspeed]"`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_jobs import optimizer_of, single_precision, without_gradients, work
from distributed_jobs import Case, loss_of
from peft import get_peft_model_state_dict
from processes import run_group
from safetensors.torch import load_file
from test_distributed import FITS, LONG, SHORT

# By rank. With a window of 6 the batches are computed in 8, 3 and 1 segments, so the second step needs as many as the
# first, on another rank, and the third fewer: what ZeRO-3 has recorded of the calls no longer holds then.
STEPS = [[[LONG], [SHORT]], [[FITS], [LONG]], [[SHORT], [FITS]]]


@pytest.mark.parametrize(
    "loss, checkpointing, config",
    [
        ("labels", False, {}),
        ("labels", True, dict(num_global_tokens=0)),
        ("logprobs", False, dict(gradient="truncated")),
        ("logprobs", True, dict(state_update="sum", state_norm="write")),
    ],
)
def test_zero3_trains_as_one_process(loss: str, checkpointing: bool, config: dict[str, Any], tmp_path: Path) -> None:
    """Losses, trained weights as they are saved, log-probabilities of policy and reference, and what is generated."""
    pytest.importorskip("deepspeed", reason="deepspeed is missing: pip install -e '.[deepspeed]'")
    steps = [Case(rows, loss, checkpointing, config) for rows in STEPS]
    run_group(2, work, tmp_path, steps)

    model = single_precision(steps[0])
    start = {name: weight.clone() for name, weight in get_peft_model_state_dict(model).items()}
    optimizer, losses = optimizer_of(model), []
    for case in steps:
        loss_of_all = loss_of(model, case.all_rows, case)
        loss_of_all.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss_of_all.detach()))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    trained = get_peft_model_state_dict(model)
    assert saved.keys() == trained.keys()
    for name, weight in trained.items():
        change = (weight - start[name]).abs().max()
        assert change > 0 and (saved[name] - weight).abs().max() <= 1e-3 * change, name
    for rank, (rows,) in enumerate(STEPS[-1]):
        found, expected = torch.load(tmp_path / f"results-{rank}.pt"), without_gradients(model, rows)
        assert found["losses"] == pytest.approx(losses, abs=1e-5)
        for actual, wanted in zip(found["logprobs"], expected["logprobs"]):
            assert (actual - wanted).abs().max() <= 1e-3
        assert torch.equal(found["generated"][0], expected["generated"][0])
