"""Rollouts of ragged requests: `generate` with PTE, vLLM with PTE, vLLM with a LoRA and its full cache.

    python benchmarks/rollouts.py                                        # a small random model on a CPU, a few minutes
    python benchmarks/rollouts.py --base FOLDER --adapter FOLDER --device cuda --dtype bfloat16

Needs an environment with vLLM (docs/vllm.md). All arms sample the same requests on the same base, so many at a time,
one arm after the other in one process; what other programs do on the machine in the meantime disturbs the times. Tokens
that were asked for are counted: `generate` goes on with a batch until its longest row is done, vLLM takes the next
request. Starting an engine is not counted, nor is a first short run.

Bytes of cache a request, behind the longest prompt and so many generated tokens: under vLLM what the engine's own
specification of its cache says of a context of that length, for `generate` the cache itself after so many tokens.
Results: `benchmarks/results/rollouts_<device>.csv`.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from memory import PROJECTIONS, provenance
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_pte import PTECache, PTEConfig

ROOM = 64  # chunks in which `generate`'s cache is filled

Requests = list[tuple[list[int], int]]  # a prompt and how many tokens are asked for


def ragged_requests(options: argparse.Namespace, vocabulary: int) -> Requests:
    """Prompts of random tokens; lengths are uniform between the bounds."""
    draw = random.Random(options.seed)

    def request() -> tuple[list[int], int]:
        prompt = [draw.randrange(3, vocabulary) for _ in range(draw.randint(*options.prompt))]
        return prompt, draw.randint(*options.completion)

    return [request() for _ in range(options.requests)]


def longest_prompt(requests: Requests) -> int:
    return max(len(prompt) for prompt, _ in requests)


def make_base(folder: Path) -> None:
    """A small random Llama."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=131072)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)


def make_adapters(options: argparse.Namespace, folder: Path) -> None:
    """`folder / "pte"`, unless there is one, and `folder / "lora"` of the same rank on the same projections."""
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    if options.adapter is None:
        config = PTEConfig(task_type="CAUSAL_LM", window_size=options.window_size, init_weights=False, pte_alpha=1)
        model = get_peft_model(base, config)
        model.save_pretrained(folder / "pte")
        base, options.adapter = model.unload(), folder / "pte"
    r = PTEConfig.from_pretrained(str(options.adapter)).r
    lora = LoraConfig(task_type="CAUSAL_LM", r=r, target_modules=PROJECTIONS, init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(folder / "lora")


# ----------------------------------------------------------------------------------------------------------- `generate`


def run_generate(options: argparse.Namespace, requests: Requests) -> dict[str, Any]:
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=getattr(torch, options.dtype))
    model = PeftModel.from_pretrained(base.to(options.device), str(options.adapter)).eval()

    def run(some: Requests) -> None:
        for start in range(0, len(some), options.at_a_time):
            generate_batch(model, some[start : start + options.at_a_time], options.device)

    run([(prompt, 4) for prompt, _ in requests[: options.at_a_time]])
    seconds = timed(lambda: run(requests))
    return dict(seconds=seconds) | bytes_of_generate(model, options, longest_prompt(requests))


def generate_batch(model: Any, batch: Requests, device: str) -> None:
    """Sample; prompts are padded on the left."""
    width = max(len(prompt) for prompt, _ in batch)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in batch], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in batch], device=device)
    longest = max(count for _, count in batch)
    options = dict(do_sample=True, max_new_tokens=longest, min_new_tokens=longest, pad_token_id=0)
    model.generate(input_ids=ids, attention_mask=mask, eos_token_id=None, **options)


@torch.no_grad()
def bytes_of_generate(model: Any, options: argparse.Namespace, prompt: int) -> dict[str, int]:
    """Of one row's cache behind so many thoughts; their number in a call never changes the result."""
    cache, sizes, seen = PTECache(), {}, 0
    model(input_ids=torch.full((1, prompt), 5, device=options.device), past_key_values=cache, logits_to_keep=1)
    for length in sorted(options.lengths):
        while seen < length:
            chunk = torch.full((1, min(ROOM, length - seen)), 5, device=options.device)
            model(input_ids=chunk, past_key_values=cache, logits_to_keep=1)
            seen += chunk.shape[1]
        sizes[f"bytes_at_{length}"] = cache.nbytes
    return sizes


# ---------------------------------------------------------------------------------------------------------------- vLLM


@contextmanager
def engine(options: argparse.Namespace, requests: Requests, **more: Any) -> Iterator[Any]:
    from vllm import LLM

    context = max(len(prompt) + count for prompt, count in requests)
    llm = LLM(
        str(options.base),
        dtype=options.dtype,
        enforce_eager=True,
        max_model_len=context,
        max_num_seqs=options.at_a_time,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        **more,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def run_vllm(options: argparse.Namespace, requests: Requests, call: dict[str, Any], **more: Any) -> dict[str, Any]:
    from vllm import SamplingParams

    with engine(options, requests, **more) as llm:

        def run(some: Requests) -> None:
            prompts = [{"prompt_token_ids": prompt} for prompt, _ in some]
            params = [SamplingParams(max_tokens=count, ignore_eos=True, detokenize=False) for _, count in some]
            outputs = llm.generate(prompts, params, use_tqdm=False, **call)
            assert [len(output.outputs[0].token_ids) for output in outputs] == [count for _, count in some]

        run([(prompt, 4) for prompt, _ in requests[: options.at_a_time]])
        seconds = timed(lambda: run(requests))
        return dict(seconds=seconds) | bytes_of_engine(llm, options, longest_prompt(requests))


def bytes_of_engine(llm: Any, options: argparse.Namespace, prompt: int) -> dict[str, int]:
    """What a request holds, by the specifications from which the engine made its cache."""
    config = llm.llm_engine.vllm_config
    groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    sizes = {}
    for length in options.lengths:
        longer = copy.copy(config)
        longer.model_config = copy.copy(config.model_config)
        longer.model_config.max_model_len = prompt + length
        sizes[f"bytes_at_{length}"] = sum(
            group.kv_cache_spec.max_memory_usage_bytes(longer) * len(group.layer_names) for group in groups
        )
    return sizes


def vllm_pte(options: argparse.Namespace, requests: Requests) -> dict[str, Any]:
    from peft_pte.vllm import overrides

    found = overrides(options.base, options.adapter, max_prompt_length=longest_prompt(requests))
    return run_vllm(options, requests, {}, hf_overrides=found)


def vllm_lora(options: argparse.Namespace, requests: Requests) -> dict[str, Any]:
    from vllm.lora.request import LoRARequest

    rank = PTEConfig.from_pretrained(str(options.adapter)).r
    request = LoRARequest("lora", 1, str(options.lora))
    return run_vllm(options, requests, dict(lora_request=request), enable_lora=True, max_lora_rank=rank)


def vllm_base(options: argparse.Namespace, requests: Requests) -> dict[str, Any]:
    return run_vllm(options, requests, {})


ARMS: dict[str, Callable[[argparse.Namespace, Requests], dict[str, Any]]] = {
    "generate, PTE": run_generate,
    "vLLM, PTE": vllm_pte,
    "vLLM, LoRA, full cache": vllm_lora,
    "vLLM, base, full cache": vllm_base,
}


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def table(rows: list[dict[str, Any]], lengths: list[int]) -> str:
    """In Markdown."""
    names = [f"{length // 1024}K" if length % 1024 == 0 else str(length) for length in lengths]
    lines = [f"| | tokens/s | {' | '.join(f'KiB at {name}' for name in names)} |", "|---" * (2 + len(names)) + "|"]
    for row in rows:
        sizes = " | ".join(f"{row[f'bytes_at_{length}'] / 1024:,.0f}" for length in lengths)
        lines.append(f"| {row['arm']} | {row['tokens_per_second']:,.0f} | {sizes} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of a Llama, Qwen2 or Qwen3 (default: a small random Llama)")
    parser.add_argument("--adapter", type=Path, help="folder of a PTE adapter for it (default: a random one)")
    parser.add_argument("--window-size", type=int, default=64, help="of a random adapter")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--at-a-time", type=int, default=16)
    parser.add_argument("--prompt", type=int, nargs=2, default=(16, 128), help="shortest and longest")
    parser.add_argument("--completion", type=int, nargs=2, default=(64, 512), help="shortest and longest")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 65536], help="where bytes are told")
    parser.add_argument("--only", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="CSV file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    # Read when vLLM is imported. One process: what the engine holds is looked at, and cores are shared.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in dict(VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_CPU_KVCACHE_SPACE="1").items():
        os.environ.setdefault(name, value)
    import vllm

    output = options.output or Path(__file__).parent / "results" / f"rollouts_{options.device}.csv"
    command = " ".join(["python", "benchmarks/rollouts.py", *sys.argv[1:]])
    about = dict(model="small" if options.base is None else options.base.name, dtype=options.dtype)
    about |= dict(requests=options.requests, at_a_time=options.at_a_time, threads=torch.get_num_threads())
    about |= dict(vllm=vllm.__version__) | provenance(options.device, command)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        if options.base is None:
            options.base = Path(name) / "base"
            make_base(options.base)
        make_adapters(options, Path(name))
        options.lora = Path(name) / "lora"
        window = PTEConfig.from_pretrained(str(options.adapter)).window_size
        requests = ragged_requests(options, AutoConfig.from_pretrained(options.base).vocab_size)
        tokens = sum(count for _, count in requests)
        for arm in options.only:
            row = dict(arm=arm, tokens=tokens) | ARMS[arm](options, requests)
            row["tokens_per_second"] = round(tokens / row["seconds"], 1)
            rows.append(row | dict(seconds=round(row["seconds"], 2), window_size=window) | about)
            print(f"{arm:<24} {tokens} tokens {row['seconds']:7.1f} s", flush=True)
            with output.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    print(table(rows, options.lengths))


if __name__ == "__main__":
    main()
