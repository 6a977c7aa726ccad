"""`PTEGRPOTrainer` rolls out under vLLM, and trains the policy that was sampled there."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from engines import server
from peft import get_peft_model
from test_trl import COMMON, PTE, base_model, grpo, prompts, reward, tokenizer

from peft_pte import PTEConfig, sequence_logprobs
from peft_pte.trainers.grpo import PTEGRPOTrainer
from peft_pte.vllm import export

VLLM = dict(use_vllm=True, vllm_max_model_length=64, beta=0.0, learning_rate=3e-2, max_steps=2)
BOUND = 1e-3


class Watch(PTEGRPOTrainer):
    """Compares vLLM's log-probabilities of a rollout with the replay under the weights of now and of the beginning."""

    watched: list[dict[str, Any]]

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        border, wanted = inputs["prompt_ids"].shape[1], inputs["completion_mask"].bool()
        own = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        now = {name: weight.detach().clone() for name, weight in own.items()}
        if not self.watched:
            self.began = now

        def difference(weights: dict[str, torch.Tensor]) -> float:
            with torch.no_grad():
                for name, weight in own.items():
                    weight.copy_(weights[name])
                logprobs, _ = sequence_logprobs(self.model, ids, mask, border, self.temperature)
                for name, weight in own.items():
                    weight.copy_(now[name])
            return float((logprobs[:, border:] - inputs["sampling_per_token_logps"])[wanted].abs().max())

        forgetful = {name: torch.zeros_like(w) if "thought_encoder" in name else w for name, w in now.items()}
        self.watched.append(
            dict(now=difference(now), began=difference(self.began), forgetful=difference(forgetful))
            | dict(prompts=inputs["prompt_mask"].sum(1).tolist(), lengths=wanted.sum(1).tolist())
        )
        return super()._compute_loss(model, inputs)


@contextmanager
def running(output: Path, kind: type = Watch, **options: Any) -> Iterator[Any]:
    run = grpo(kind, output, **(VLLM | options))
    run.watched = []
    try:
        yield run
    finally:
        if run.args.vllm_mode == "colocate":
            run.vllm_generation.llm.llm_engine.engine_core.shutdown()


def ratios(run: Any) -> list[float]:
    """Of each step, how far its importance ratios are from 1."""
    logs = [entry for entry in run.state.log_history if "importance_ratio/min" in entry]
    return [max(abs(entry["importance_ratio/min"] - 1), abs(entry["importance_ratio/max"] - 1)) for entry in logs]


def check(run: Any) -> None:
    """Two steps: each rollout follows the weights of its time, whose state matters."""
    print([(watched["now"], watched["began"], watched["forgetful"]) for watched in run.watched], ratios(run))
    assert len(ratios(run)) == len(run.watched) == 2
    assert max(ratios(run)) <= BOUND
    first, second = run.watched
    assert first["now"] <= BOUND and second["now"] <= BOUND < 10 * BOUND < second["began"]
    for watched in run.watched:
        assert watched["forgetful"] > 10 * BOUND
        assert max(watched["lengths"]) > 2 * PTE["window_size"] and len(set(watched["lengths"])) > 1
    assert len(set(first["prompts"] + second["prompts"])) > 1


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        # What cuts the distribution changes what is drawn, and not the policy that is compared.
        dict(temperature=0.7, top_k=9, top_p=0.8, generation_kwargs=dict(min_p=0.01)),
        dict(vllm_importance_sampling_correction=False, gradient="truncated", steps_per_generation=1),
    ],
    ids=["plain", "cuts", "no correction"],
)
def test_rollouts_of_an_engine_in_the_process(tmp_path: Path, options: dict[str, Any]) -> None:
    with running(tmp_path, **options) as run:
        run.train()
    check(run)


JOB = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from test_serving_trl import check, running

if __name__ == "__main__":
    with running(Path(sys.argv[1]), ddp_find_unused_parameters=False) as run:
        run.train()
        assert run.accelerator.num_processes == 2
        check(run)
    print(f"process {{run.accelerator.process_index}} as expected", flush=True)
"""


def test_rollouts_of_two_processes(tmp_path: Path) -> None:
    """DDP: each has an engine of its own, and prompts of its own."""
    here = Path(__file__).parent
    (tmp_path / "job.py").write_text(JOB.format(paths=[str(here), str(here.parent)]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "job.py"), str(tmp_path / "run")]
    job = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    for process in range(2):
        assert f"process {process} as expected" in job.stdout, job.stdout[-2000:] + job.stderr[-4000:]


def test_rollouts_of_a_server(tmp_path: Path) -> None:
    """It serves another adapter at first, and gets the trainer's. What it says of tokens has the same meaning."""
    base_model().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    other = get_peft_model(base_model(), PTEConfig(**PTE, init_weights=False, pte_alpha=1))
    folder = export(tmp_path / "base", other, tmp_path / "served", max_prompt_length=40)
    context = ["--max-model-len", "64", "--logprobs-mode", "processed_logprobs"]
    with server(folder, *context) as address:
        options = dict(vllm_mode="server", vllm_server_base_url=address, vllm_max_model_length=None)
        with running(tmp_path / "run", temperature=0.7, top_k=9, **options) as run:
            run.train()
    check(run)


def test_penalties_are_seen(tmp_path: Path) -> None:
    """As for rollouts with `generate`: they change what is drawn from, which a warning says and the ratios show."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with running(tmp_path, repetition_penalty=1.5, max_steps=1) as run:
            run.train()
    assert any("repetition_penalty=1.5" in str(warning.message) for warning in caught)
    assert ratios(run)[0] > 1e-2


def test_a_prompt_without_slots_is_refused(tmp_path: Path) -> None:
    with running(tmp_path, vllm_max_model_length=26) as run, pytest.raises(ValueError) as refused:
        run.train()
    assert re.search(r"A prompt has \d tokens.*leaves 2 beside `max_completion_length=24`", str(refused.value))


def test_trl_s_own_trainer_is_refused(tmp_path: Path) -> None:
    """It would merge the adapter before it syncs."""
    base_model().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    run = trl.GRPOTrainer(
        model=str(tmp_path / "base"),
        processing_class=tokenizer(),
        reward_funcs=reward,
        args=trl.GRPOConfig(output_dir=str(tmp_path), num_generations=4, **(COMMON | VLLM)),
        train_dataset=prompts(),
        peft_config=PTEConfig(**PTE),
    )
    try:
        with pytest.raises(NotImplementedError, match="merge"):
            run.train()
    finally:
        run.vllm_generation.llm.llm_engine.engine_core.shutdown()
