"""What an engine does around the layers: pages, new weights, requests and options that are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import add, engine, expected, generate, random_prompts, sampling, served_model, step
from models import tiny_model, with_adapter
from test_trl import tokenizer
from vllm.exceptions import VLLMValidationError

from peft_pte import PTEConfig
from peft_pte.vllm import overrides, update_adapter
from peft_pte.vllm.colocated import colocated_engine


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def test_requests_wait_and_are_never_preempted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page holds all that a request will ever need, so with fewer pages than requests the others wait."""
    model = served_model(tmp_path, window_size=8)
    prompts = random_prompts([9, 30, 2, 41, 17])
    with engine(tmp_path / "served", num_gpu_blocks_override=3, max_num_seqs=5) as llm:  # page 0 is nobody's
        scheduler, running = scheduler_of(llm), []
        monkeypatch.setattr(scheduler, "_preempt_request", lambda *args, **kwargs: pytest.fail("preempted"))
        schedule = scheduler.schedule
        monkeypatch.setattr(
            scheduler, "schedule", lambda *args: (schedule(*args), running.append(len(scheduler.running)))[0]
        )
        assert generate(llm, prompts, 60) == expected(model, prompts, 60)
        assert max(running) == 2


def test_a_request_that_starts_again_has_its_border_where_it_was(tmp_path: Path) -> None:
    """Somebody asks for it: all that was generated is computed anew, as thoughts and not as a prompt."""
    model = served_model(tmp_path, window_size=8)
    prompts = random_prompts([9, 30, 2])
    with engine(tmp_path / "served", max_num_batched_tokens=32) as llm:
        add(llm, prompts, [sampling(60)] * 3)
        assert not step(llm, steps=40)
        requests = list(scheduler_of(llm).requests.values())
        assert llm.reset_prefix_cache(reset_running_requests=True)
        assert [request.num_computed_tokens for request in requests] == [0, 0, 0]
        assert max(len(request.output_token_ids) for request in requests) > 30
        finished = step(llm)
        assert [request.num_preemptions for request in requests] == [1, 1, 1]
    assert [list(finished[index].outputs[0].token_ids) for index in range(3)] == expected(model, prompts, 60)


def test_new_weights_in_a_running_engine(tmp_path: Path) -> None:
    served_model(tmp_path, window_size=8)
    other = with_adapter(tiny_model("llama", torch.float32), seed=77, window_size=8)
    other.add_adapter("second", other.peft_config["default"])
    prompts = random_prompts([9, 30, 2])
    with engine(tmp_path / "served") as llm:
        before = generate(llm, prompts, 40)
        update_adapter(llm, other)
        first = expected(other, prompts, 40)
        assert before != first == generate(llm, prompts, 40)
        update_adapter(llm, other, adapter_name="second")
        other.set_adapter("second")
        second = expected(other, prompts, 40)
        assert first != second == generate(llm, prompts, 40)
        add(llm, prompts, [sampling(5)] * 3)
        with pytest.raises(ValueError, match="unfinished requests"):
            update_adapter(llm, other)
        step(llm)
        wider = with_adapter(tiny_model("llama", torch.float32), window_size=9, r=6)
        with pytest.raises(ValueError, match=r"r=6 \(here 5\), window_size=9 \(here 8\)"):
            update_adapter(llm, wider)
        fewer = with_adapter(tiny_model("llama", torch.float32), window_size=8, target_modules=["q_proj"])
        with pytest.raises(ValueError, match="differ in their weights.*low_rank.v_proj.A"):
            update_adapter(llm, fewer)
        assert generate(llm, prompts, 40) == second


def test_a_base_without_a_copy(tmp_path: Path) -> None:
    model = served_model(tmp_path, "qwen2", window_size=8)
    model.save_pretrained(tmp_path / "adapter")
    prompts = random_prompts([9, 64])
    found = overrides(tmp_path / "base", tmp_path / "adapter", max_prompt_length=64)
    with engine(tmp_path / "base", hf_overrides=found) as llm:
        assert generate(llm, prompts, 30) == expected(model, prompts, 30)


@pytest.mark.parametrize("family, tied", [("qwen2", True), ("qwen3", False)])
def test_an_engine_with_the_weights_of_a_model_in_memory(family: str, tied: bool) -> None:
    """Of the base and of an adapter that is not the first one; no checkpoint is written."""
    model = with_adapter(tiny_model(family, torch.float32, tie_word_embeddings=tied), window_size=9)
    torch.manual_seed(3)
    model.add_adapter("second", PTEConfig(r=4, num_global_tokens=3, pte_alpha=4, window_size=8, init_weights=False))
    model.set_adapter("second")
    prompts = random_prompts([9, 30, 2])
    options = dict(dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=3)
    llm = colocated_engine(model, tokenizer(), 40, **options)
    try:
        assert generate(llm, prompts, 40) == expected(model, prompts, 40)
    finally:
        llm.llm_engine.engine_core.shutdown()
    quantised = tiny_model(family, torch.float32)
    quantised.is_quantized = True
    with pytest.raises(ValueError, match="quantised"):
        colocated_engine(with_adapter(quantised, window_size=8), tokenizer(), 40, **options)


def test_a_prompt_that_is_too_long_is_refused_alone(tmp_path: Path) -> None:
    model = served_model(tmp_path, window_size=8)
    prompts = random_prompts([64, 65])
    with engine(tmp_path / "served") as llm:
        add(llm, prompts[:1], [sampling(30)])
        step(llm, steps=3)
        with pytest.raises(VLLMValidationError, match="65 tokens.*max_prompt_length=65"):
            llm.llm_engine.add_request("long", {"prompt_token_ids": prompts[1]}, sampling(3))
        with pytest.raises(VLLMValidationError, match="streaming input"):
            processor, tasks = llm.llm_engine.input_processor, llm.llm_engine.get_supported_tasks()
            processor.process_inputs("part", {"prompt_token_ids": prompts[0]}, sampling(3), tasks, resumable=True)
        assert [list(step(llm)[0].outputs[0].token_ids)] == expected(model, prompts[:1], 30)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"enable_prefix_caching": True}, "enable_prefix_caching"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"enable_lora": True}, "enable_lora|LoRA"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size|[Pp]ipeline"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative_config"),
        ({"hf_overrides": {"pte": None}}, "must name an adapter"),
    ],
    ids=str,
)
def test_options_that_are_refused(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    served_model(tmp_path, window_size=8)
    with pytest.raises(Exception, match=reason), engine(tmp_path / "served", **options):
        pass


def test_memory_of_a_request_is_constant(tmp_path: Path) -> None:
    """One page, of the size that the states have, whatever is generated."""
    served_model(tmp_path, window_size=8)
    with engine(tmp_path / "served") as llm:
        add(llm, random_prompts([5]), [sampling(200)])
        sizes = set()
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            manager = scheduler_of(llm).kv_cache_manager
            for request in scheduler_of(llm).running:
                sizes.add(tuple(map(len, manager.get_block_ids(request.request_id))))
        [group] = scheduler_of(llm).kv_cache_config.kv_cache_groups
    assert sizes == {(1,)}
    core, state, slots = 6 * 5, 5 * 5, 2 * 2 * (64 + 8) * 8
    assert group.kv_cache_spec.page_size_bytes == 4 * (core + state + slots)


WORKER = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from engines import engine, expected, generate, random_prompts
from models import tiny_model, with_adapter
import torch
from peft_pte.vllm import update_adapter

if __name__ == "__main__":
    other = with_adapter(tiny_model("llama", torch.float32), seed=77, window_size=8)
    prompts = random_prompts([9, 30, 2])
    with engine(sys.argv[1]) as llm:
        before = generate(llm, prompts, 30)
        update_adapter(llm, other)
        assert before != expected(other, prompts, 30) == generate(llm, prompts, 30)
    print("as expected")
"""


def test_an_engine_in_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM runs by itself: the engine and its worker have processes of their own, which load the plugin."""
    served_model(tmp_path, window_size=8)
    here = Path(__file__).parent
    (tmp_path / "job.py").write_text(WORKER.format(paths=[str(here), str(here.parent)]))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    command = [sys.executable, str(tmp_path / "job.py"), str(tmp_path / "served")]
    job = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert "as expected" in job.stdout, job.stdout[-2000:] + job.stderr[-4000:]
