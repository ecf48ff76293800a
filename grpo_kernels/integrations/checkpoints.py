"""What makes a run safe to stop: alone in its folder, checkpoints whole or not there, nothing changed on resume."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from grpo_kernels.integrations.trl import GroupRobustDPOTrainer

MANIFEST = "files.json"  # names and sizes of a checkpoint's files
CANNOT_WRITE = (OSError, RuntimeError, SafetensorError)  # a full disk, as Python, torch.save and safetensors say it


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system lets go of when the process ends, however it ends.

    Raises:
        ValueError: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out must not be in use, another run is writing to {str(folder)!r}") from None
        yield


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """
    Raises:
        OSError: ``path`` could not be written; names it, which a full disk does not.
    """
    try:
        yield
    except CANNOT_WRITE as error:
        raise OSError(f"{path} could not be written: {error}") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """
    Raises:
        ValueError: ``path`` does not hold what a run has written there; names it.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A neighbour of ``path`` to write a file or a folder to; at the end it takes the name, so that no half is seen.

    Raises:
        OSError: it could not be written; names ``path``.
    """
    temporary = path.with_name(f".{path.name}.part")
    _remove(temporary)
    with naming(path):
        try:
            yield temporary
            _flush(temporary)
            _remove(path)
            temporary.rename(path)
        except CANNOT_WRITE:
            _remove(temporary)
            raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """To the disk, so that a loss of power leaves no renamed folder with empty files."""
    for part in [path, *path.rglob("*")]:
        handle = os.open(part, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class ResumableTrainer(GroupRobustDPOTrainer):
    """GroupRobustDPOTrainer whose checkpoints are written beside their place and take it when they are whole."""

    _part: Path | None = None

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *more: Any) -> Any:
        """Alike in the folders beside this one, whatever the group options: the cache has the reference's pass."""
        others = ("output_dir", "logging_dir", "run_name")
        kept = {name: v for name, v in vars(args).items() if name not in others and not name.startswith("group_")}
        beside = SimpleNamespace(**kept, output_dir=str(Path(args.output_dir).parent))
        return super()._prepare_dataset(dataset, processing_class, beside, *more)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial=trial) if self._part is None else str(self._part)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        out, name, saves = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}", self.args.should_save
        self._part = out / ".part"
        if saves:
            _remove(self._part)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            best = out / f"checkpoint-{self.state.best_global_step}"
            if best.name == name or best.exists():  # Trainer looks for it beside the new one
                self.state.best_model_checkpoint = str(best)
            self.accelerator.wait_for_everyone()
            if saves:
                self._put_in_place(self._part / name, out / name)
                for path in sort_checkpoints(str(out)):
                    if _step_of(path) > self.state.global_step:  # of before the resume: it will come again
                        _remove(Path(path))
                rotate_checkpoints(str(out), self.args.save_total_limit, self.state.best_model_checkpoint)
        except CANNOT_WRITE as error:
            _remove(self._part)
            good = newest_whole(out)
            raise OSError(f"{out / name} could not be written: {error}; the last good checkpoint is {good}") from error
        finally:
            self._part = None
        self.accelerator.wait_for_everyone()

    def _put_in_place(self, part: Path, place: Path) -> None:
        self.state.save_to_json(str(part / "trainer_state.json"))
        sizes = {str(file.relative_to(part)): file.stat().st_size for file in part.rglob("*") if file.is_file()}
        (part / MANIFEST).write_text(json.dumps(sizes))
        _flush(part)
        _remove(place)  # one that was not whole
        part.rename(place)
        _remove(part.parent)


def whole_checkpoints(folder: Path) -> Iterator[str]:
    """The whole ones of a trainer's checkpoints, the newest first; warns of newer ones that are not."""
    for path in reversed(sort_checkpoints(str(folder))):
        manifest = Path(path, MANIFEST)
        with reading(manifest):
            sizes = json.loads(manifest.read_text()) if manifest.is_file() else {MANIFEST: 0}
            broken = [name for name, size in sizes.items() if not _has_size(Path(path, name), size)]
        if broken:
            warnings.warn(f"{path} is not whole ({', '.join(broken)}): passed over", UserWarning, stacklevel=3)
        else:
            yield path


def newest_whole(folder: Path) -> str | None:
    return next(whole_checkpoints(folder), None)


def to_go_on_from(folder: Path) -> str | None:
    """The newest whole checkpoint before the end: from one at the end Trainer would take a step more."""
    return next((path for path in whole_checkpoints(folder) if not _is_at_the_end(path)), None)


def _is_at_the_end(path: str) -> bool:
    with reading(Path(path, "trainer_state.json")):
        state = TrainerState.load_from_json(str(Path(path, "trainer_state.json")))
        early = state.stateful_callbacks.get("EarlyStoppingCallback")
        stopped = (
            bool(early)
            and early["attributes"]["early_stopping_patience_counter"] >= early["args"]["early_stopping_patience"]
        )
        return stopped or state.global_step >= state.max_steps


def _step_of(path: str) -> int:
    return int(path.rsplit("-", 1)[1])


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def digest_of_rows(rows: Dataset) -> str:
    of_all = hashlib.sha256()
    for row in rows:
        of_all.update(json.dumps(row, default=str).encode())
    return of_all.hexdigest()


def digest_of_files(name: str | None) -> str:
    """Of the contents of a file, or of all files of a folder; "" where there is none (a name on the hub)."""
    if name is None or not (path := Path(name)).exists():
        return ""
    of_all = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                of_all.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return of_all.hexdigest()


def stored_run(file: Path, resume: bool) -> dict[str, Any]:
    """What the run that is to be resumed has stored in its folder; {} of a new run.

    Raises:
        ValueError: there is no run to resume, it is damaged, or one is in the way.
    """
    if resume and not file.is_file():
        raise ValueError(f"out must hold a run to resume, {str(file.parent)!r} has no {file.name}")
    if not resume and file.exists():
        raise ValueError(f"out must not hold a run already: {str(file.parent)!r} does; --resume goes on with it")
    if not resume:
        return {}
    with reading(file):
        stored = json.loads(file.read_text())
        return {**stored, "arguments": [str(word) for word in stored["arguments"]]}


def check_unchanged(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: data, model, groups, ... are not those of the run to resume; names which and how.
    """
    for name, value in now.items():
        if name in saved and saved[name] != value:  # older runs have saved fewer
            shown = "changed since" if name.endswith("_sha256") else f"was {saved.get(name)}, is {value}"
            raise ValueError(f"{name.removesuffix('_sha256')} must be that of the run to resume: {shown}")
