"""Adapters travel: save and load under another name, in another process, on the meta device, in another dtype."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from models import relative_error, tiny_model, with_adapter
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_config, get_peft_model_state_dict
from test_policy import Case, cases, right_padded
from transformers import AutoModelForCausalLM

from peft_pte import PTEConfig

IDS = torch.randint(3, 61, (2, 30), generator=torch.Generator().manual_seed(0))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, prompt_lengths=5).logits


@settings(max_examples=15)
@given(case=cases())
def test_any_configuration_survives(tmp_path_factory: pytest.TempPathFactory, case: Case) -> None:
    folder = tmp_path_factory.mktemp("adapter")
    model = with_adapter(tiny_model(case.family, seed=case.seed), **case.config)
    ids, mask = right_padded(case)
    batch = dict(input_ids=ids, attention_mask=mask, prompt_lengths=case.prompts)
    model.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = PeftModel.from_pretrained(tiny_model(case.family, seed=case.seed), folder).eval()
    weights, saved = get_peft_model_state_dict(loaded), get_peft_model_state_dict(model)
    assert weights.keys() == saved.keys() and all(torch.equal(weights[key], saved[key]) for key in saved)
    with torch.no_grad():  # equal weights in memory of other alignment differ in the last bit of a product
        assert relative_error(loaded(**batch).logits, model(**batch).logits) <= 1e-12
    expected, actual = model.peft_config["default"].to_dict(), loaded.peft_config["default"].to_dict()
    changed = ("inference_mode", "base_model_name_or_path")
    assert {k: v for k, v in actual.items() if k not in changed} == {
        k: v for k, v in expected.items() if k not in changed
    }


def test_saved_before_there_was_a_convolution(tmp_path: Path) -> None:
    """Adapters whose configuration does not know newer fields behave as they did, however they are loaded."""
    model = with_adapter(
        tiny_model("llama"), window_size=8, conv_size=1, output_source="attention_output", output_gate=False
    )
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    older = {name: saved.pop(name) for name in ("conv_size", "output_source", "output_gate")}
    assert older == dict(conv_size=1, output_source="attention_output", output_gate=False)
    path.write_text(json.dumps(saved))
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    assert relative_error(logits(loaded), logits(model)) <= 1e-12
    for config in (PeftConfig.from_pretrained(tmp_path), PTEConfig.from_pretrained(tmp_path)):
        assert {name: getattr(config, name) for name in older} == older
    # Who writes a configuration gets the default, also from a dictionary.
    written = get_peft_config(dict(peft_type="PTE"))
    assert (written.conv_size, written.output_source, written.output_gate) == (2, "hidden_states", True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A base model and an adapter on disk, and the logits of the two together."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model("qwen2", torch.float32).save_pretrained(folder / "base")
    model = with_adapter(AutoModelForCausalLM.from_pretrained(folder / "base", dtype="float32"), window_size=8)
    model.save_pretrained(folder / "adapter")
    return folder, logits(model)


@pytest.mark.parametrize("options", [{}, dict(low_cpu_mem_usage=True), dict(adapter_name="another")])
def test_load(saved: tuple[Path, torch.Tensor], options: dict) -> None:
    folder, expected = saved
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="float32")
    model = PeftModel.from_pretrained(base, folder / "adapter", **options)
    assert relative_error(logits(model), expected) <= 1e-5


def test_load_twice_under_two_names(saved: tuple[Path, torch.Tensor]) -> None:
    folder, expected = saved
    model = with_adapter(AutoModelForCausalLM.from_pretrained(folder / "base", dtype="float32"), seed=9, window_size=8)
    own = logits(model)
    model.load_adapter(folder / "adapter", "loaded")
    assert relative_error(logits(model), own) <= 1e-5
    model.set_adapter("loaded")
    assert relative_error(logits(model), expected) <= 1e-5
    model.delete_adapter("default")
    assert relative_error(logits(model), expected) <= 1e-5


def test_auto_class_and_other_dtype(saved: tuple[Path, torch.Tensor]) -> None:
    folder, expected = saved
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype="float32")
    assert relative_error(logits(model), expected) <= 1e-5
    half = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype="bfloat16")
    assert half.get_base_model().dtype == torch.bfloat16
    assert relative_error(logits(half).float(), expected) < 0.2


def test_on_the_hub_it_is_found_as_pte(saved: tuple[Path, torch.Tensor]) -> None:
    folder, _ = saved
    assert isinstance(PeftConfig.from_pretrained(folder / "adapter"), PTEConfig)
    card = ModelCard.load(folder / "adapter" / "README.md")
    assert {"pte", "peft_pte"} <= set(card.data.tags) and card.data.library_name == "peft"


def loading_code(folder: Path) -> str:
    """The first block of Python in a model card."""
    return (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]


def test_the_model_card_begins_with_code_that_loads_the_adapter(
    saved: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, expected = saved
    base = str(folder / "base")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))  # else the folder counts as temporary
    monkeypatch.chdir(folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), "adapter")
    model.load_adapter("adapter", "second")
    for _ in range(2):  # a card that is there is brought up to date, not doubled
        model.save_pretrained(folder / "adapter", selected_adapters=["default"])
    model.save_pretrained(folder / "two", selected_adapters=["second"])
    card = ModelCard.load(folder / "adapter" / "README.md")
    assert card.text.strip().startswith("<!-- how to load") and card.text.count("## Loading this adapter") == 1
    for name in ("adapter", "two"):
        code, loaded = loading_code(folder / name), {}
        assert code.startswith("import peft_pte") and f"from_pretrained({base!r})" in code
        exec("\n".join(line for line in code.splitlines() if not line.startswith("tokenizer")), loaded)
        assert relative_error(logits(loaded["model"]), expected) <= 1e-5
    monkeypatch.setattr(tempfile, "tempdir", str(folder))  # as for `push_to_hub`
    model.save_pretrained(folder / "upload", selected_adapters=["default"])
    assert "from_pretrained(base, 'this repository')" in loading_code(folder / "upload")
    model.peft_config["default"].save_pretrained(folder / "config only")
    assert [path.name for path in (folder / "config only").iterdir()] == ["adapter_config.json"]


SCRIPT = """
    import sys
    import torch
    from peft import AutoPeftModelForCausalLM

    torch.set_num_threads(1)
    model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
    with torch.no_grad():
        torch.save(model(input_ids=torch.load(sys.argv[2]), prompt_lengths=5).logits, sys.argv[3])
"""


def test_another_process_and_the_module_runner(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    """`python -m peft_pte script.py` runs a script that never heard of `peft_pte`; without it the type is unknown."""
    folder, expected = saved
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    torch.save(IDS, tmp_path / "ids")
    arguments = [tmp_path / "script.py", folder / "adapter", tmp_path / "ids", tmp_path / "logits"]
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert run.returncode and "PTE" in run.stderr
    subprocess.run([sys.executable, "-m", "peft_pte", *arguments], check=True, capture_output=True)
    assert relative_error(torch.load(tmp_path / "logits"), expected) <= 1e-5


def test_registration_is_idempotent_and_defends_the_name() -> None:
    from peft.utils import PeftType

    from peft_pte import PTEModel
    from peft_pte.registration import register

    register(PTEConfig, PTEModel)
    assert PeftType.PTE is PeftType("PTE") is PeftType["PTE"]
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    stranger = type("Stranger", (), {"__module__": "somebody_else.config"})
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.PTE] = stranger
    try:
        with pytest.raises(ImportError, match="already registered by 'somebody_else.config'"):
            register(PTEConfig, PTEModel)
    finally:
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.PTE] = PTEConfig
