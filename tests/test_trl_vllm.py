"""Rollouts under vLLM, as far as there is no vLLM in it: what is refused, and what is asked of a server."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("trl", reason="TRL is an optional dependency: pip install peft-pte[trl]")

from accelerate import Accelerator
from models import tiny_model, with_adapter
from test_trl import base_model, grpo
from trl.distributed import DistributedBackend

from peft_pte import PTEConfig
from peft_pte.trainers import rollouts
from peft_pte.trainers.grpo import PTEGRPOTrainer

ROOM = dict(use_vllm=True, vllm_max_model_length=64)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(vllm_max_model_length=None), r"`vllm_max_model_length` is None.*`max_completion_length` \(24\)"),
        (dict(vllm_max_model_length=24), "`vllm_max_model_length=24` leaves no room"),
        (dict(vllm_mode="elsewhere"), "`vllm_mode='elsewhere'`"),
        (dict(vllm_model_impl="transformers"), "`vllm_model_impl='transformers'`"),
        (dict(vllm_enable_sleep_mode=True), "`vllm_enable_sleep_mode=True`"),
        (dict(vllm_tensor_parallel_size=2), "`vllm_tensor_parallel_size=2`"),
        (dict(generation_kwargs=dict(n=2)), "`n` in `generation_kwargs`.*`num_generations`"),
        (dict(generation_kwargs=dict(logprobs=5)), "`logprobs` in `generation_kwargs`"),
        (dict(generation_kwargs=dict(temperature=0.5)), "`temperature` in `generation_kwargs`"),
        (dict(generation_kwargs=dict(max_tokens=99)), "`max_tokens` in `generation_kwargs`"),
        (dict(generation_kwargs=dict(seed=1)), "`seed` in `generation_kwargs`"),
    ],
    ids=str,
)
def test_settings_that_are_refused_before_anything_is_built(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grpo(PTEGRPOTrainer, tmp_path, **(ROOM | options))


def test_a_window_of_the_prompt_is_refused(tmp_path: Path) -> None:
    model = with_adapter(base_model(), window_size="prompt", r=4)
    with pytest.raises(ValueError, match="`window_size='prompt'` of `PTEConfig`"):
        grpo(PTEGRPOTrainer, tmp_path, model=model, **ROOM)


def test_an_integer_prefix_needs_no_longest_prompt() -> None:
    assert rollouts.longest_prompt(PTEConfig(retained_prefix=4), None, 24) == 1
    assert rollouts.longest_prompt(PTEConfig(), 64, 24) == 40


def test_without_vllm_it_is_named(tmp_path: Path) -> None:
    with (
        patch.object(rollouts, "is_vllm_available", lambda: False),
        pytest.raises(ImportError, match="`use_vllm=True` needs vLLM.*docs/vllm.md"),
    ):
        grpo(PTEGRPOTrainer, tmp_path, **ROOM)
    # The class is put in TRL's place for this one only.
    assert rollouts.grpo_trainer.VLLMGeneration is rollouts.VLLMGeneration


def test_trl_s_own_weights_for_vllm_are_refused() -> None:
    """`trl.GRPOTrainer` merges, whatever the mode is."""
    model = with_adapter(tiny_model("llama", torch.float32))
    own = SimpleNamespace(model=model, _dist=DistributedBackend(Accelerator(cpu=True)))
    with pytest.raises(NotImplementedError, match="merge"):
        next(rollouts.VLLMGeneration._iter_named_params(own))


class Server:
    """Answers like TRL's client of a server with these workers and requests."""

    def __init__(
        self, extension: str = "peft_pte.vllm.update.AdapterUpdates", running: int = 0, error: str | None = None
    ):
        self.base_url, self.extension, self.error = "http://server", extension, error
        metrics = (
            "# TYPE vllm:num_requests_running gauge\n"
            f'vllm:num_requests_running{{engine="0"}} {running}.0\n'
            'vllm:num_requests_waiting{engine="0"} 0.0\n'
            'vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 7.0\n'
        )
        self.session = SimpleNamespace(get=lambda url: SimpleNamespace(text=metrics, raise_for_status=lambda: None))
        self.calls: list[tuple[str, list[str]]] = []

    def get_server_info(self) -> dict[str, Any]:
        model = {"logprobs_mode": "processed_logprobs"}
        return {"parallel_config": {"worker_extension_cls": self.extension}, "model_config": model}

    def _post(self, url: str, json: dict[str, Any]) -> dict[str, Any]:
        assert url == "http://server/collective_rpc"
        self.calls.append((json["method"], json["args"]))
        return {"results": [None, self.error]}


def with_server(tmp_path: Path, server: Server) -> Any:
    with (
        patch.object(rollouts, "is_vllm_available", lambda: True),
        patch.object(rollouts, "VLLMClient", lambda **options: server),
    ):
        return grpo(PTEGRPOTrainer, tmp_path, use_vllm=True, vllm_mode="server")


def test_a_server_gets_the_adapter_in_words(tmp_path: Path) -> None:
    server = Server()
    run = with_server(tmp_path, server)
    run.vllm_generation.sync_weights()
    assert [method for method, _ in server.calls] == ["pte_note_before_cuts", "pte_update_adapter"]
    assert all(isinstance(argument, str) for _, arguments in server.calls for argument in arguments)


def test_servers_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="serves no PTE adapter.*peft_pte.vllm.export"):
        with_server(tmp_path, Server(extension=""))
    with pytest.raises(ValueError, match="another sampler"):
        with_server(tmp_path, Server(error="another sampler"))
    run = with_server(tmp_path, Server(running=2))
    with pytest.raises(ValueError, match="has 2 unfinished requests"):
        run.vllm_generation.sync_weights()


def test_a_base_that_is_trained_too_is_refused(tmp_path: Path) -> None:
    run = with_server(tmp_path, Server())
    run.model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"The base model is trained, too \(model.norm.weight\)"):
        run.vllm_generation.sync_weights()
