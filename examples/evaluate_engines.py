"""The arms of an evaluation, and what makes completions: transformers' `generate`, and vLLM where it is installed."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from peft import PeftConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

import peft_pte
from checkpoint import dtype_here
from controls import add_window
from peft_pte import PTECache, PTEConfig
from peft_pte.trainers.rows import left_padded


class Arm(NamedTuple):
    """`adapter`: the PEFT type of its adapter; `bounded`: under the bounded cache; `encodes`: with the encoding."""

    adapter: str | None
    bounded: bool
    encodes: bool = False


ARMS = {
    "base": Arm(None, bounded=False),
    "lora": Arm("LORA", bounded=False),
    "lora-windowed": Arm("LORA", bounded=True),
    "global-only": Arm("PTE", bounded=True),
    "pte": Arm("PTE", bounded=True, encodes=True),
}
# Of `add_window`: the smallest adapter that is nothing but its cache.
WINDOW_ONLY: dict[str, Any] = dict(r=1, num_global_tokens=1, state_update="none", state_norm="none")

# (row of the batch, its tokens with the one that ended it, whether it ended by itself)
OnEnd = Callable[[int, list[int], bool], None]


class Engine(Protocol):
    """Makes the completions of a batch."""

    def complete(self, prompts: list[list[int]], seed: int, on_end: OnEnd) -> int | None:
        """Call `on_end` for every row as soon as it ends; returns bytes of the cache for a sequence, if known."""

    def close(self) -> None:
        """Nothing more will be asked for."""


def adapter_config(arm: str, path: str) -> PeftConfig:
    """The configuration of an arm's adapter.

    Raises:
        SystemExit: there is none, or it is of another kind than the arm's.
    """
    try:
        config = PeftConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--adapter {arm}={path}: there is no adapter: {error}.") from error
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    where = f"--adapter {arm}={path}"
    if kind != ARMS[arm].adapter:
        raise SystemExit(f"{where}: is of type {kind}, but {arm!r} needs one of type {ARMS[arm].adapter}.")
    if kind == "PTE" and (config.state_update != "none") != ARMS[arm].encodes:
        needs = "one that encodes" if ARMS[arm].encodes else "one that was trained with 'none'"
        raise SystemExit(f"{where}: has state_update={config.state_update!r}, but {arm!r} needs {needs}.")
    return config


def cache_policy(options: argparse.Namespace) -> dict[str, Any]:
    """What the bounded arms share besides the window, of the PTE adapter's configuration unless it is given."""
    path = options.adapters.get("pte") or options.adapters.get("global-only")
    config = PeftConfig.from_pretrained(path) if path else PTEConfig()
    ratio = config.eviction_ratio if options.eviction_ratio is None else options.eviction_ratio
    return dict(eviction_ratio=ratio, retained_prefix=config.retained_prefix)


def stop_tokens(model: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends a completion: of the checkpoint's generation settings, else the tokenizer's.

    Raises:
        SystemExit: neither says.
    """
    try:
        found = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # the checkpoint has none
        found = None
    found = tokenizer.eos_token_id if found is None else found
    if found is None:
        raise SystemExit(f"--model {model}: neither generation_config.json nor the tokenizer has an eos_token.")
    return found if isinstance(found, list) else [found]


# ------------------------------------------------------------------------------------------------------------ generate


class Generate:
    """`generate`, on a GPU if there is one. One model for all windows of an arm."""

    def __init__(self, arm: str, options: argparse.Namespace, stops: list[int]):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        base = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype_here(options.dtype)).to(device)
        sampling = dict(do_sample=True, temperature=options.temperature, top_p=options.top_p, top_k=0)
        # All of it is said here: checkpoints come with penalties and cuts of their own.
        base.generation_config = GenerationConfig(
            max_new_tokens=options.max_new_tokens,
            eos_token_id=stops,
            pad_token_id=stops[0],
            repetition_penalty=1.0,
            **(sampling if options.temperature else dict(do_sample=False)),
        )
        self.stops = stops
        self.window: int | None = None  # of the next batches
        self.policy, self.bounded = cache_policy(options), ARMS[arm].bounded
        self.model = base
        if arm in options.adapters:
            self.model = PeftModel.from_pretrained(base, options.adapters[arm])
        if ARMS[arm].adapter == "LORA" and self.bounded:
            add_window(self.model, PTEConfig(**WINDOW_ONLY))
        self.model.eval()

    def complete(self, prompts: list[list[int]], seed: int, on_end: OnEnd) -> int | None:
        given = left_padded(prompts, self.stops[0], self.model.device)
        width, running = given["input_ids"].shape[1], set(range(len(prompts)))
        stops = torch.tensor(self.stops, device=self.model.device)

        def note(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            for row in torch.isin(ids[:, -1], stops).nonzero()[:, 0].tolist():
                if row in running:
                    running.remove(row)
                    on_end(row, ids[row, width:].tolist(), True)
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        cache = PTECache() if self.bounded else DynamicCache()
        torch.manual_seed(seed)
        with peft_pte.window(self.model, self.window, **self.policy) if self.bounded else nullcontext():
            done = self.model.generate(**given, past_key_values=cache, stopping_criteria=StoppingCriteriaList([note]))
        for row in sorted(running):
            on_end(row, done[row, width:].tolist(), False)
        if isinstance(cache, PTECache):
            return cache.nbytes // len(prompts)
        return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)) // len(prompts)

    def close(self) -> None:
        """The model goes with the engine."""


# ---------------------------------------------------------------------------------------------------------------- vLLM


class VLLM:
    """vLLM: the base as it is, and PTE through `peft_pte.vllm`; an engine for each window."""

    def __init__(self, arm: str, window: int | None, options: argparse.Namespace, stops: list[int], longest: int):
        try:
            from vllm import LLM
        except ImportError as error:
            raise SystemExit(f"--engine vllm: vLLM cannot be imported: {error}.") from error
        settings: dict[str, Any] = {}
        if window is not None:
            from peft_pte.vllm import overrides

            adapter = self.with_window(arm, window, options)
            settings["hf_overrides"] = overrides(options.model, adapter, max_prompt_length=longest)
        self.options, self.stops = options, stops
        self.llm = LLM(
            options.model,
            dtype=dtype_here(options.dtype),
            max_model_len=longest + options.max_new_tokens,
            max_num_seqs=options.batch_size,
            enforce_eager=window is not None,  # no CUDA graph is made of PTE's layers
            generation_config="vllm",  # not the checkpoint's own penalties and cuts
            skip_tokenizer_init=True,  # prompts are tokens, and so are completions
            **settings,
        )

    def close(self) -> None:
        """Give back the memory, before the engine of the next window."""
        self.llm.llm_engine.engine_core.shutdown()

    @staticmethod
    def with_window(arm: str, window: int, options: argparse.Namespace) -> Path:
        """A copy of the adapter whose configuration has the window."""
        from peft_pte.vllm.folder import adapter_folder

        source, target = adapter_folder(options.adapters[arm]), options.output / "vllm" / f"{arm}-{window}"
        shutil.copytree(source, target, dirs_exist_ok=True)
        config = json.loads((source / "adapter_config.json").read_text())
        config |= dict(window_size=window) | cache_policy(options)
        (target / "adapter_config.json").write_text(json.dumps(config))
        PTEConfig.from_pretrained(str(target)).check()
        return target

    def complete(self, prompts: list[list[int]], seed: int, on_end: OnEnd) -> int | None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        options, engine = self.options, self.llm.llm_engine
        for row, prompt in enumerate(prompts):
            sampling = SamplingParams(
                temperature=options.temperature,
                top_p=options.top_p,
                max_tokens=options.max_new_tokens,
                stop_token_ids=self.stops,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                seed=seed * 1000 + row if options.temperature else None,
            )
            engine.add_request(str(row), dict(prompt_token_ids=prompt), sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    (answer,) = output.outputs
                    on_end(int(output.request_id), list(answer.token_ids), answer.finish_reason == "stop")
        return None
