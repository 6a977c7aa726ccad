"""pytest plugin (`-p conformance`): point PEFT's own parametrised tests at PTE, without touching them.

PEFT's tests name their parameters alike: `config_cls,config_kwargs` (or `config_class,...`) is the method, `model_id`
the model. The marks with these names get the rows below. What is not parametrised by the method, or only by prompt
learning methods, is about other methods, and is deselected.
"""

from __future__ import annotations

from typing import Any

import pytest
from offline_hub import MODELS
from peft import PromptLearningConfig

from peft_pte import PTEConfig

# The inputs of PEFT's tests are three tokens long.
SMALL: dict[str, Any] = dict(task_type="CAUSAL_LM", r=4, num_global_tokens=3)
CONFIGS = [
    pytest.param(PTEConfig, SMALL, id="window-not-reached"),
    pytest.param(PTEConfig, SMALL | dict(window_size=1, retained_prefix=1), id="evicting-delta"),
    pytest.param(
        PTEConfig,
        SMALL | dict(window_size=1, retained_prefix=1, state_update="sum", state_norm="write"),
        id="evicting-sum",
    ),
]
NO_REENTRANT = "PTE refuses reentrant gradient checkpointing, which would lose gradients through the cache."
NO_MERGING = "PTE does not support merging adapters: the update depends on the sequence."

METHOD_ROWS: dict[str, list[Any]] = {
    "config_cls,config_kwargs": CONFIGS,
    "config_class,mandatory_kwargs": [pytest.param(PTEConfig, {}, id="PTEConfig")],
    "config_class": [pytest.param(PTEConfig, id="PTEConfig")],
}
OTHER_ROWS: dict[str, list[Any]] = {
    "model_id": list(MODELS),
    "use_reentrant": [pytest.param(True, marks=pytest.mark.skip(reason=NO_REENTRANT)), False],
}


def names_of(mark: pytest.Mark) -> str | None:
    """The argument names of a parametrize mark, without spaces; None for other marks."""
    if mark.name != "parametrize":
        return None
    names = mark.args[0] if mark.args else mark.kwargs["argnames"]
    return (names if isinstance(names, str) else ",".join(names)).replace(" ", "")


def is_about_pte(definition: Any) -> bool:
    """Whether a test (item or definition) is parametrised by the PEFT method, and not by prompt learning ones only."""
    for mark in definition.own_markers:
        if names_of(mark) in METHOD_ROWS:
            rows = mark.args[1] if len(mark.args) > 1 else mark.kwargs["argvalues"]
            return not all(issubclass(method_of(row), PromptLearningConfig) for row in rows)
    return False


def method_of(row: Any) -> type:
    """The configuration class of a row: the first value of a `pytest.param`, of a tuple, or the row itself."""
    values = getattr(row, "values", row)
    return values[0] if isinstance(values, (tuple, list)) else values


def pytest_configure(config: pytest.Config) -> None:
    """Teach the suite's own helper that PTE adapters cannot be merged."""
    import tests.testing_common as common

    skip_others = common._skip_if_merging_not_supported

    def skip_if_merging_not_supported(model_id: str, config_cls: type, config_kwargs: dict[str, Any]) -> None:
        if issubclass(config_cls, PTEConfig):
            pytest.skip(NO_MERGING)
        skip_others(model_id, config_cls, config_kwargs)

    common._skip_if_merging_not_supported = skip_if_merging_not_supported


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace the rows of parametrize marks by ours."""
    if not is_about_pte(metafunc.definition):
        return
    marks, rows = metafunc.definition.own_markers, METHOD_ROWS | OTHER_ROWS
    for index, mark in enumerate(marks):
        names = names_of(mark)
        if names in rows:
            marks[index] = pytest.mark.parametrize(names, rows[names]).mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests of other methods."""
    others = [item for item in items if not is_about_pte(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if is_about_pte(item)]
