"""lm-evaluation-harness, run for real: what it scores and generates is the policy of the bounded cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model, with_adapter
from peft import AutoPeftModelForCausalLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_pte import sequence_logprobs

pytest.importorskip("lm_eval", reason="needs the extra [test]")

WORDS = [f"w{i:02}" for i in range(61)]  # none is a part of another, since "w01" is a special token
TASKS = {
    "score": dict(output_type="loglikelihood", doc_to_target=" {{target}}"),
    "choose": dict(output_type="multiple_choice", doc_to_choice="{{choices}}", doc_to_target="{{0}}"),
    "roll": dict(output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{prompt}} {{target}}"),
    "write": dict(
        output_type="generate_until",
        doc_to_target="{{target}}",
        generation_kwargs=dict(until=["w02"], max_gen_toks=40, do_sample=False),
        metric_list=[dict(metric="exact_match")],
    ),
}


def text(length: int, generator: torch.Generator) -> str:
    return " ".join(WORDS[i] for i in torch.randint(3, 61, (length,), generator=generator))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with a tokenizer, an adapter with a window of 8, rows of text, and a task of each kind."""
    folder = tmp_path_factory.mktemp("lm_eval")
    base = tiny_model("llama", torch.float32)
    base.save_pretrained(folder / "base")
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w00"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w00", bos_token="w01", eos_token="w02")
    tokenizer.save_pretrained(folder / "base")
    base.config._name_or_path = base.name_or_path = str(folder / "base")
    with_adapter(base, window_size=8).save_pretrained(folder / "adapter")
    generator = torch.Generator().manual_seed(0)
    rows = [
        dict(
            prompt=text(length, generator),
            target=text(50 - 2 * length, generator),
            choices=[text(n, generator) for n in (1, 20, 30)],
        )
        for length in range(3, 12)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tasks").mkdir()
    for name, task in TASKS.items():
        common = dict(
            task=name,
            dataset_path="json",
            dataset_kwargs=dict(data_files={"test": str(folder / "rows.jsonl")}),
            test_split="test",
            doc_to_text="{{prompt}}",
        )
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(common | task))  # JSON is YAML
    return folder


def harness(folder: Path, model: str, *tasks: str, runner: tuple[str, ...] = ("-m", "lm_eval")) -> tuple[dict, str]:
    """The samples of each task, and what was printed on the way."""
    output = folder / model
    arguments = f"pretrained={folder / 'base'},peft={folder / 'adapter'},dtype=float32,max_length=100"
    command = [sys.executable, "-m", "peft_pte", *runner, "--model", model, "--model_args", arguments]
    command += ["--tasks", ",".join(tasks), "--include_path", str(folder / "tasks"), "--device", "cpu"]
    command += ["--batch_size", "4", "--log_samples", "--output_path", str(output)]
    environment = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(folder / "cache"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    files = {task: next(output.rglob(f"samples_{task}_*.jsonl")) for task in tasks}
    return {t: [json.loads(line) for line in path.read_text().splitlines()] for t, path in files.items()}, done.stderr


def tokens(words: str) -> list[int]:
    return [WORDS.index(word) for word in words.split()]


@torch.no_grad()
def score(model: torch.nn.Module, context: list[int], continuation: list[int]) -> float:
    ids = torch.tensor([context + continuation])
    return float(sequence_logprobs(model, ids, prompt_lengths=len(context))[0].sum())


def test_scores_and_texts_are_those_of_the_policy(folder: Path) -> None:
    samples, errors = harness(folder, "pte-hf", *TASKS)
    assert "PTE was called outside of" not in errors
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype="float32").eval()
    for sample in samples["score"]:
        (result,) = sample["filtered_resps"]
        assert float(result[0]) == pytest.approx(
            score(model, tokens(sample["doc"]["prompt"]), tokens(sample["target"])), 1e-4
        )
    for sample in samples["choose"]:
        for choice, result in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            expected = score(model, tokens(sample["doc"]["prompt"]), tokens(choice))
            assert float(result[0]) == pytest.approx(expected, 1e-4)
    for sample in samples["roll"]:
        expected = score(model, [1], tokens(f"{sample['doc']['prompt']} {sample['doc']['target']}"))
        assert float(sample["filtered_resps"][0]) == pytest.approx(expected, 1e-4)
    for sample in samples["write"]:
        ids = torch.tensor([tokens(sample["doc"]["prompt"])])
        (written,) = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        written = written[ids.shape[1] :].tolist()
        written = [token for token in (written[: written.index(2)] if 2 in written else written) if token > 2]
        assert tokens(sample["filtered_resps"][0]) == written


def test_batches_lengths_and_models_without_an_adapter(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Scores do not depend on the batch size, also one that is searched for; without an adapter they are `hf`'s."""
    from lm_eval.models.huggingface import HFLM

    from peft_pte.lm_eval import PTEHFLM

    base = dict(pretrained=str(folder / "base"), dtype="float32", max_length=50, device="cpu")
    generator = torch.Generator().manual_seed(1)

    def request(context: int, continuation: int) -> tuple:
        draw = [torch.randint(3, 61, (size,), generator=generator).tolist() for size in (context, continuation)]
        return (str(context), str(continuation)), *draw

    requests = [request(*sizes) for sizes in ((5, 20), (9, 3), (40, 30), (3, 1), (7, 40), (1, 49))]

    def scores(model: HFLM) -> list[tuple[float, bool]]:
        return model._loglikelihood_tokens(requests, disable_tqdm=True)

    plain, hf = scores(PTEHFLM(**base, batch_size=2)), scores(HFLM(**base, batch_size=2))
    assert [greedy for _, greedy in plain] == [greedy for _, greedy in hf]
    assert [score for score, _ in plain] == pytest.approx([score for score, _ in hf], 1e-5)
    assert "A context of 40 tokens loses its beginning" in caplog.text
    adapter = base | dict(peft=str(folder / "adapter"))
    searched = scores(PTEHFLM(**adapter, batch_size="auto", max_batch_size=4))
    assert [s for s, _ in searched] == pytest.approx([s for s, _ in scores(PTEHFLM(**adapter, batch_size=1))], 1e-5)
    assert [s for s, _ in searched] != pytest.approx([s for s, _ in plain], 1e-2)
    for sizes in ((0, 4), (4, 0), (4, 51)):
        with pytest.raises(ValueError, match=r"`max_length` \(50\) at most"):
            PTEHFLM(**adapter)._loglikelihood_tokens([request(*sizes)], disable_tqdm=True)


def test_the_plain_way_warns(folder: Path) -> None:
    """The harness's own model says nothing of the context, so the full cache answers; but not in silence."""
    samples, errors = harness(folder, "hf", "score", runner=("lm_eval",))
    assert "PTE was called outside of `generate`" in errors and "--model pte-hf" in errors
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype="float32").eval()
    sample: dict[str, Any] = samples["score"][0]
    expected = score(model, tokens(sample["doc"]["prompt"]), tokens(sample["target"]))
    assert float(sample["filtered_resps"][0][0]) != pytest.approx(expected, 1e-3)
