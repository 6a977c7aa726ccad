"""GRPO's rollouts under vLLM: TRL's generation, with an engine that has the adapter in it. See docs/vllm.md."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from trl import GRPOConfig
from trl.extras.profiling import ProfilingContext
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.import_utils import is_vllm_available
from trl.trainer import grpo_trainer
from trl.trainer.utils import ensure_master_addr_port

from ..config import PTEConfig
from ..static import pte_adapter
from ..vllm.folder import base_weights
from ..vllm.update import update_adapter, update_arguments

# In `generation_kwargs`: what the trainer takes from elsewhere, or counts on.
OWN_SAMPLING = {
    "n": "set `num_generations`",
    "logprobs": "the trainer asks for that of the token that was drawn, and takes the first one that it gets",
    "temperature": "set `temperature`, at which the trained log-probabilities are taken",
    "max_tokens": "set `max_completion_length`",
    "seed": "all completions of a prompt would be drawn alike. Leave it out",
}


def refuse_vllm(args: GRPOConfig, config: PTEConfig) -> None:
    """Raise `ValueError` for settings of rollouts under vLLM that PTE cannot honour."""

    def no(name: str, reason: str) -> None:
        raise ValueError(f"`{name}={getattr(args, name)!r}` is not supported with PTE under vLLM: {reason}")

    if args.vllm_mode not in ("colocate", "server"):
        no("vllm_mode", "it is 'colocate' or 'server'.")
    if args.vllm_model_impl != "vllm":
        no("vllm_model_impl", "the bounded cache is in vLLM's own models. Leave it at 'vllm'.")
    if args.vllm_enable_sleep_mode:
        no(
            "vllm_enable_sleep_mode",
            "sleeping drops the base model's weights, and only the adapter's are sent. Leave it out.",
        )
    if args.vllm_mode == "colocate" and args.vllm_tensor_parallel_size > 1:
        no("vllm_tensor_parallel_size", "all heads of a layer are encoded together. Leave it at 1.")
    if config.window_size == "prompt":
        raise ValueError(
            "`window_size='prompt'` of `PTEConfig` is not supported with `use_vllm=True`: in training it is the length "
            "of the longest prompt of a batch, and under vLLM every request is a batch of its own. Set a number."
        )
    for name, instead in OWN_SAMPLING.items():
        if name in (args.generation_kwargs or {}):
            raise ValueError(f"`{name}` in `generation_kwargs` is not supported with `use_vllm=True`: {instead}.")
    if args.vllm_mode == "colocate":
        longest_prompt(config, args.vllm_max_model_length, args.max_completion_length)


def longest_prompt(config: PTEConfig, max_model_length: int | None, max_completion_length: int) -> int:
    """For how many tokens of a prompt there are to be slots.

    TRL has no field for it; what is left of the context beside the completion is the longest prompt.

    Raises:
        ValueError: nothing says how long the context is, or nothing is left of it.
    """
    if config.retained_prefix != "prompt":
        return 1  # no slot depends on it
    if max_model_length is None:
        raise ValueError(
            "`vllm_max_model_length` is None, but with retained_prefix='prompt' there must be slots for the longest "
            "prompt. Set `vllm_max_model_length` to the length of the longest prompt plus `max_completion_length` "
            f"({max_completion_length})."
        )
    if max_model_length <= max_completion_length:
        raise ValueError(
            f"`vllm_max_model_length={max_model_length}` leaves no room for prompts beside "
            f"`max_completion_length={max_completion_length}`. Set it to the length of the longest prompt plus "
            "`max_completion_length`."
        )
    return max_model_length - max_completion_length


@contextmanager
def vllm_generation() -> Iterator[None]:
    """While a `GRPOTrainer` is built: it builds the class of here where it names TRL's."""
    with patch.object(grpo_trainer, "VLLMGeneration", PTEGeneration):
        yield


class PTEGeneration(VLLMGeneration):
    """`trl`'s generation under vLLM for a model with a PTE adapter.

    Nothing is merged: before the first rollout, and before each one after an optimizer step, the adapter's weights are
    sent into the engine. The log-probabilities that come back are those of the policy that is trained: at the
    temperature, before top-k, top-p and min-p cut the distribution.
    """

    def _init_vllm(self) -> None:
        """Build the engine, or reach the server."""
        if not is_vllm_available():
            raise ImportError("`use_vllm=True` needs vLLM, in an environment of its own: see docs/vllm.md.")
        if self._dist.is_fsdp or self._dist.is_zero3:
            raise ValueError(
                "`use_vllm=True` is not supported with PTE under FSDP or ZeRO-3: its parameters are sharded. Train "
                "with DDP or ZeRO-2, or roll out with `generate` (`use_vllm=False`)."
            )
        _, self.pte_config = pte_adapter(self.model, None)
        if self.mode == "server":
            if self.accelerator.is_main_process:
                self._reach_server()
        else:
            self._build_engine()
        self.accelerator.wait_for_everyone()

    def _build_engine(self) -> None:
        from ..vllm.colocated import colocated_engine  # needs vLLM

        accelerator = self.accelerator
        # As in TRL: read by vLLM, which joins the processes that there are.
        os.environ["RANK"] = str(accelerator.process_index)
        os.environ["LOCAL_RANK"] = str(accelerator.local_process_index)
        os.environ["WORLD_SIZE"] = str(accelerator.num_processes)
        ensure_master_addr_port()
        self.max_prompt_length = longest_prompt(self.pte_config, self.max_model_length, self.max_completion_length)
        self.llm = colocated_engine(
            self.model,
            self.processing_class,
            self.max_prompt_length,
            dtype=self._dtype(),
            enforce_eager=True,  # evictions are decided on the host, step by step
            gpu_memory_utilization=self.gpu_memory_utilization,
            max_model_len=self.max_model_length,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=4096,
            distributed_executor_backend="external_launcher",
            seed=accelerator.process_index,
            trust_remote_code=self.trust_remote_code,
        )
        raise_errors(self.llm.collective_rpc("pte_note_before_cuts"))

    def _dtype(self) -> str:
        """Of the engine: that in which the model is trained."""
        mixed = {"bf16": "bfloat16", "fp16": "float16"}.get(self.accelerator.mixed_precision)
        return mixed or str(self.model.get_base_model().dtype).removeprefix("torch.")

    def _reach_server(self) -> None:
        base_url = self.server_base_url or f"http://{self.server_host}:{self.server_port}"
        self.vllm_client = VLLMClient(base_url=base_url, connection_timeout=self.server_timeout)
        workers = self.vllm_client.get_server_info()["parallel_config"]["worker_extension_cls"]
        if not workers:
            raise ValueError(
                f"The vLLM server at {base_url} serves no PTE adapter. Write a folder with `peft_pte.vllm.export`, and "
                "start `VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER`."
            )
        self._call_server("pte_note_before_cuts")

    def _call_server(self, method: str, *args: str) -> None:
        """Call a method of the server's workers, and raise what it says is wrong."""
        client = self.vllm_client
        url = f"{client.base_url}/collective_rpc"
        raise_errors(client._post(url, json={"method": method, "args": list(args)})["results"])

    def sync_weights(self) -> None:
        """Send the adapter's weights.

        Raises:
            ValueError: the engine has requests that are not finished, or serves another adapter; or more than the
                adapter is trained.
        """
        if trained := [name for name, weight in base_weights(self.model) if weight.requires_grad]:
            raise ValueError(
                f"The base model is trained, too ({', '.join(trained[:3])}), but only the adapter's weights are sent "
                "to vLLM. Freeze it, or roll out with `generate` (`use_vllm=False`)."
            )
        if self.mode == "colocate":
            update_adapter(self.llm, self.model)
        elif self.accelerator.is_main_process:
            name, config = pte_adapter(self.model, None)
            if running := unfinished_requests(self.vllm_client):
                raise ValueError(
                    f"The vLLM server at {self.vllm_client.base_url} has {running} unfinished requests, which would go "
                    "on with what was encoded by the old weights. It must serve this trainer alone."
                )
            self._call_server("pte_update_adapter", *update_arguments(self.model, name, config))
        self.accelerator.wait_for_everyone()

    def generate(
        self,
        prompts: list[list[int]],
        images: list[list | None] | None,
        num_generations: int,
        profiler: ProfilingContext | None = None,
    ) -> tuple:
        """As TRL's.

        Raises:
            ValueError: a prompt is longer than there are slots for.
        """
        longest = max(map(len, prompts), default=0)
        keeps_all = self.pte_config.retained_prefix == "prompt"
        if self.mode == "colocate" and keeps_all and longest > self.max_prompt_length:
            raise ValueError(
                f"A prompt has {longest} tokens, but `vllm_max_model_length={self.max_model_length}` leaves "
                f"{self.max_prompt_length} beside `max_completion_length={self.max_completion_length}`. Set "
                f"`vllm_max_model_length={longest + self.max_completion_length}` or more."
            )
        return super().generate(prompts, images, num_generations, profiler)


def raise_errors(answers: list[str | None]) -> None:
    """Raise `ValueError` with the first thing that a worker says is wrong."""
    if any(answers):
        raise ValueError(next(filter(None, answers)))


def unfinished_requests(client: VLLMClient) -> int:
    """Of a server: those that run or wait."""
    response = client.session.get(f"{client.base_url}/metrics")
    response.raise_for_status()
    names = "vllm:num_requests_running{", "vllm:num_requests_waiting{"
    counts = [line for line in response.text.splitlines() if line.startswith(names)]
    return round(sum(float(line.rsplit(maxsplit=1)[1]) for line in counts))
