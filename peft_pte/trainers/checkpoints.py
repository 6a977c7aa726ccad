"""Checkpoints that are complete or not there, for training runs that may be killed at any moment.

`transformers.Trainer` writes into `checkpoint-N` file by file. A run that is killed while it saves leaves a folder with
torn or missing files, and `resume_from_checkpoint=True` picks it, since its number is the highest. Instead:

    class MyTrainer(AtomicCheckpoints, SFTTrainer): ...
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint, sort_checkpoints

from ..model_card import add_loading_code
from ..registration import NAME

# Of mixins; for type checkers, with all that a Trainer has.
TrainerBase: Any = object

# Beside the checkpoints, hence on the same filesystem. It is no checkpoint by its name, and the Trainer's uploads to
# the Hub leave out what begins with an underscore.
STAGING = "_incomplete"


def sync(*paths: Path) -> None:
    """Wait until files and folders are on the disk."""
    if os.name == "posix":  # elsewhere folders cannot be opened
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def refuse_order(cls: type, mixin: type) -> None:
    """Refuse a class that names a mixin after the Trainer whose methods it extends."""
    if Trainer in cls.__mro__[: cls.__mro__.index(mixin)]:
        raise TypeError(f"{cls.__name__}: name {mixin.__name__} before the Trainer, else it has no effect.")


class AtomicCheckpoints(TrainerBase):
    """Mixin for a `Trainer` of any kind, named before it among the base classes.

    A checkpoint is written to a staging folder, flushed to the disk and renamed; what rotation removes is renamed
    first. `save_model` writes beside the files of an older model and then replaces them one by one. What a killed run
    has left is removed by the next save. Several processes must share the filesystem.

    A run that is resumed behind its last step is as it was: the Trainer would take one step more.

    It relies on this, the same in transformers 5.16 to 5.24: `_save_checkpoint` asks `_get_output_dir` where
    checkpoints go, and ends with an upload by `_push_from_checkpoint` and the rotation; `_save` writes the model;
    `_finalize_training` keeps only the best checkpoint if `save_total_limit` is 1.
    """

    _staging: Path | None = None  # while a checkpoint is being written

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_order(cls, AtomicCheckpoints)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True  # True: the Trainer says why not
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # loaded by what is built in training
        if isinstance(resume_from_checkpoint, str | os.PathLike) and not sharded:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            if 0 < self.args.max_steps <= state.global_step:
                self._load_from_checkpoint(str(resume_from_checkpoint))
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, best = Path(self._get_output_dir(trial)), self.state.best_model_checkpoint
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        best_checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.args.should_save:
            shutil.rmtree(folder / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = folder / STAGING
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        # It has been looked for in the staging folder.
        found = best_checkpoint == checkpoint or best_checkpoint.exists()
        self.state.best_model_checkpoint = str(best_checkpoint) if found else best
        self.accelerator.wait_for_everyone()  # each process has written its part
        if self.args.should_save:
            written = folder / STAGING / checkpoint.name
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            sync(*written.rglob("*"), written)
            if checkpoint.exists():  # of a run that was resumed further back
                os.rename(checkpoint, folder / STAGING / "replaced")
            os.rename(written, checkpoint)
            sync(folder)
            self._rotate(folder, [str(checkpoint), self.state.best_model_checkpoint], self.args.save_total_limit)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _rotate(self, folder: Path, kept: list[str | None], limit: int | None) -> None:
        """As `transformers.trainer_utils.rotate_checkpoints`, but a folder that is being removed is no checkpoint."""
        protected = {str(Path(path)) for path in kept if path is not None}
        checkpoints = sort_checkpoints(str(folder), use_mtime=True)
        surplus = len(checkpoints) - max(limit, len(protected)) if limit is not None and limit > 0 else 0
        (folder / STAGING).mkdir(exist_ok=True)
        for path in [path for path in checkpoints if path not in protected][: max(0, surplus)]:
            os.rename(path, folder / STAGING / Path(path).name)
        shutil.rmtree(folder / STAGING, ignore_errors=True)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        best = self.state.best_model_checkpoint
        if self.args.should_save and self.args.save_total_limit == 1 and best is not None and Path(best).exists():
            self._rotate(Path(self._get_output_dir(trial)), [best], limit=1)
        return super()._finalize_training(trial, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, which writes the card anew; it begins with how to load the adapter."""
        super().create_model_card(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        saved = getattr(model, "peft_config", {}).values()
        if self.args.should_save and any(config.peft_type == NAME for config in saved):
            base = getattr(model.config, "_name_or_path", None)
            add_loading_code(self.args.output_dir, base, adapter=self.hub_model_id)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else the folder is renamed while it is uploaded
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if self._staging is not None:  # part of a checkpoint
            return super()._save(output_dir, state_dict=state_dict)
        staging = folder / STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            if (folder / "README.md").exists():  # PEFT amends it
                shutil.copy(folder / "README.md", staging)
        super()._save(str(staging), state_dict=state_dict)
        if self.args.should_save:
            files = [path for path in staging.rglob("*") if path.is_file()]
            sync(*files)
            for path in files:
                target = folder / path.relative_to(staging)
                target.parent.mkdir(exist_ok=True)
                os.replace(path, target)
            sync(folder)
            shutil.rmtree(staging)
