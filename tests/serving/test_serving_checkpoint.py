"""A pretrained checkpoint under vLLM: the answers of `generate`, far past the window."""

from __future__ import annotations

import os
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from engines import add, differences, engine, expected, sampling, step
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from controls import states_zeroed
from peft_pte import PTEConfig
from peft_pte.vllm import overrides

FOLDER = Path(os.environ.get("PTE_CHECKPOINT", Path(__file__).parents[2] / "outputs" / "smollm2-135m-instruct"))
QUESTIONS = (
    "How is bread made?",
    "Write a short story about a lighthouse keeper and her dog.",
    "What is the difference between a list and a tuple in Python?",
    "Why is the sky blue? Explain it to a child.",
)
WINDOW, TOKENS = 32, 120


def briefly_trained(tokenizer: AutoTokenizer, steps: int = 6) -> PeftModel:
    """On a few pages of English: enough for an adapter that acts, not for a good one."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    model = get_peft_model(base, PTEConfig(task_type="CAUSAL_LM", window_size=WINDOW, eviction_ratio=0.5))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    pages = sorted(topics.values(), key=len)[-2 * steps :]
    for first, second in zip(pages[::2], pages[1::2]):
        ids = torch.tensor([tokenizer(page)["input_ids"][:96] for page in (first, second)])
        model(input_ids=ids, labels=ids, prompt_lengths=8).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.skipif(
    not (FOLDER / "config.json").is_file(),
    reason="Needs SmolLM2-135M-Instruct: `make demo-real` writes it to outputs/smollm2-135m-instruct. Or name the "
    "folder of another chat model of a family that runs under vLLM in PTE_CHECKPOINT.",
)
def test_answers_of_a_real_checkpoint(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = briefly_trained(tokenizer)
    model.save_pretrained(tmp_path / "adapter")
    prompts = [
        tokenizer.apply_chat_template([dict(role="user", content=question)], add_generation_prompt=True)["input_ids"]
        for question in QUESTIONS
    ]
    here = expected(model, prompts, TOKENS)
    with states_zeroed():
        forgetful = expected(model, prompts, TOKENS)
    found = overrides(FOLDER, tmp_path / "adapter", max_prompt_length=max(map(len, prompts)))
    with engine(FOLDER, hf_overrides=found, max_num_batched_tokens=32) as llm:
        add(llm, prompts, [sampling(TOKENS)] * len(prompts))
        outputs = step(llm)
    there = [list(outputs[index].outputs[0].token_ids) for index in range(len(prompts))]
    error = max(max(differences(model, output)) for output in outputs.values())
    print(f"log-probabilities differ by {error:.1e} at most")
    for question, answer, other in zip(QUESTIONS, there, forgetful):
        agreed = sum(a == b for a, b in zip(answer, other))
        print(f"{question}\n  {tokenizer.decode(answer)!r}\n  (with states of zero: {agreed} of {TOKENS} tokens alike)")
    assert there == here
    assert error <= 1e-3
    # The state acts from the first token on, and here past the window.
    assert all(answer[WINDOW:] != other[WINDOW:] for answer, other in zip(there, forgetful))
