"""`python -m grpo_kernels train`: GroupRobustDPOTrainer from a data file to a table, in one process or many."""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings
from collections import Counter
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import EarlyStoppingCallback
from transformers.utils import logging
from trl import get_peft_config, get_quantization_config

from grpo_kernels.groups.weights import GroupWeights
from grpo_kernels.integrations import callbacks, checkpoints
from grpo_kernels.integrations import datasets as pairs
from grpo_kernels.integrations import transformers as hf
from grpo_kernels.integrations.trl.data import PAIR_OPTIONS, GroupColumn
from grpo_kernels.training import report, start
from grpo_kernels.training.options import loss_at_zero, parse

UNIFORM = {"group_step_size": 0.0, "group_options": None, "group_baseline": None, "group_estimator": "importance"}
LOSS_OPTIONS = (  # beside beta and loss_type: others make another objective, which a resumed run must not go over to
    *("label_smoothing", "loss_weights", "f_divergence_type", "f_alpha_divergence_coef", "discopop_tau"),
    *("ld_alpha", "use_weighting", "alpha_follows", "average_log_prob", "max_length", "truncation_mode"),
    *PAIR_OPTIONS.values(),
)
ARMS: dict[str, dict[str, Any]] = {"plain": UNIFORM, "IS": UNIFORM, "robust": {}}  # changes of the trainer's config


def train(arguments: list[str]) -> int:
    """The exit status: 0, or 130 and 143 for a run that Ctrl-C or SIGTERM has stopped with everything saved."""
    warnings.simplefilter("ignore", FutureWarning)  # of the libraries about each other
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are raised, too
    run, stop = None, callbacks.StopOnSignal()
    try:
        run = Run(arguments, stop)
        with checkpoints.alone_in(run.out) if run.is_main else nullcontext():
            run.start()
    except callbacks.Interrupted as interrupted:
        if run is not None and run.saved.exists():
            run.say(f"stopped; go on with: python -m grpo_kernels train --resume --out {run.out}", sys.stderr)
        return 128 + interrupted.number
    finally:
        stop.restore()
    PartialState().destroy_process_group()
    return 0


class Run:
    """One run in one folder: its options, its data, and the arms to train from one start."""

    def __init__(self, arguments: list[str], stop: callbacks.StopOnSignal) -> None:
        self.stop = stop
        self.options, self.config, self.model = parse(arguments)
        self.ranks = PartialState()
        self.is_main = self.ranks.is_main_process
        if not self.is_main:
            warnings.simplefilter("ignore")
            os.environ["TQDM_DISABLE"] = "1"
        self.out = Path(broadcast_object_list([self.config.output_dir])[0]).absolute()
        self.saved, resume = self.out / "run.json", self.options.resume
        self.stored = checkpoints.stored_run(self.saved, resume) if resume or self.is_main else {}
        if resume:
            arguments = [*self.stored["arguments"], *arguments]  # the later of two counts
            self.options, self.config, self.model = parse(arguments)
        self.arguments = [word for word in arguments if word != "--resume"]

    def say(self, text: str, file: Any = None) -> None:
        if self.is_main:
            print(text, file=file or sys.stdout, flush=True)

    def start(self) -> None:
        options, config = self.options, self.config
        skip = options.on_bad_row == "skip"
        how = pairs.Reading(config.group_column, skip, options.eval_fraction, options.split_by, config.seed)
        with self.ranks.main_process_first():
            self.train_rows, self.eval_rows = pairs.load_pairs(options.data, options.eval_data, how)
        if len(self.train_rows) < 5000:  # tokenising takes no time: no bars
            datasets.disable_progress_bars()
        facts = self._facts()
        self._check_or_save(facts)
        self._describe(facts)
        small = self.out / "start"
        name = self.model.model_name_or_path or start.small_model(small, self.train_rows, options, config)
        self.tokenizer = start.tokenizer_of(name, config, self.model)
        for rows, source in ((self.train_rows, options.data), (self.eval_rows, options.eval_data)):
            pairs.check_tokens(rows, self.tokenizer, source or options.data)
        arms = list(ARMS) if options.compare else ["robust"]
        for arm in arms:
            if not (self.out / arm / "model").exists():
                self._train_arm(arm, name)
        if self.is_main:
            report.finish(self.out, arms, facts)

    def _facts(self) -> dict[str, Any]:
        """What results.json says of the run, and what must be the same when it is resumed."""
        config, model = self.config, self.model.model_name_or_path
        column = GroupColumn(config.group_column)
        groups = dict(sorted(Counter(column.names_in(self.train_rows, "data")).items()))
        # As the trainer will make them, so that a wrong option does not wait for the warm-up.
        given: Any = config.group_sizes
        sizes = dict(sorted((given or groups).items()))
        of_groups = config.group_weights_options(list(sizes))
        GroupWeights(group_sizes=list(sizes.values()), **of_groups)
        del of_groups["update"]  # it may change with the number of processes
        per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * self.ranks.num_processes
        return {
            "model": model or "small Llama",
            "data": self.options.data,
            "loss_type": " + ".join(config.loss_type),
            "beta": config.beta,
            "step_size": config.group_step_size,
            "seed": config.seed,
            "loss_at_zero": loss_at_zero(config),
            "loss_options": {name: getattr(config, name) for name in LOSS_OPTIONS},
            "groups": groups,
            "group_options": {"group_sizes": given, **of_groups},
            "pairs_per_step": per_step,
            "data_sha256": checkpoints.digest_of_rows(self.train_rows),
            "eval_data_sha256": checkpoints.digest_of_rows(self.eval_rows),
            "model_sha256": checkpoints.digest_of_files(model),
            "config_sha256": checkpoints.digest_of_files(dict(pairwise(self.arguments)).get("--config")),
        }

    def _check_or_save(self, facts: dict[str, Any]) -> None:
        if self.options.resume:
            checkpoints.check_unchanged(self.stored, facts)
        elif self.is_main:
            with checkpoints.whole(self.saved) as part:
                part.write_text(json.dumps({"arguments": self.arguments, **facts}, indent=2))
        self.ranks.wait_for_everyone()

    def _describe(self, facts: dict[str, Any]) -> None:
        groups = ", ".join(f"{name} {size}" for name, size in facts["groups"].items())
        self.say(
            f"{facts['model']} on {facts['data']}: {len(self.train_rows)} training pairs ({groups}), "
            f"{len(self.eval_rows)} evaluation pairs, {facts['pairs_per_step']} pairs a step, output in {self.out}"
        )
        if self.options.data == pairs.POLIS:
            self.say(pairs.POLIS_SOURCE)

    # -- an arm ------------------------------------------------------------------------------------------------

    def _train_arm(self, arm: str, name: str) -> None:
        folder = self.out / arm
        trainer = self._trainer(arm, name, folder)
        checkpoint = checkpoints.to_go_on_from(folder) if self.options.resume else None
        if checkpoint is not None:
            trainer.args.eval_on_start = False  # it is in the checkpoint's history
        trained = trainer.train(resume_from_checkpoint=checkpoint)
        if self.stop.number:
            raise callbacks.Interrupted(self.stop.number)
        if self.is_main:
            # max_length may have left some out of those that the file has
            train_pairs = Counter(trainer.train_dataset[trainer.group_column.prepared])
            about = {"group_names": trainer.group_names, "train_pairs": dict(sorted(train_pairs.items()))}
            about |= {"samples": report.samples_of(trainer, self.options), "seconds": trained.metrics["train_runtime"]}
            with checkpoints.whole(folder / "arm.json") as part:
                part.write_text(json.dumps(about))
        model = folder / "model"  # the last to be written: an arm that has it is done
        with checkpoints.whole(model) if self.is_main else nullcontext(folder / ".model.part") as part:
            trainer.save_model(str(part))
        self.ranks.wait_for_everyone()

    def _trainer(self, arm: str, name: str, folder: Path) -> Any:
        config, model = copy.copy(self.config), self.model
        config.__dict__.update(ARMS[arm], output_dir=str(folder))
        loading = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
        config.model_init_kwargs = {**loading, "revision": model.model_revision, **(config.model_init_kwargs or {})}
        watchers = [self.stop, callbacks.EvaluateAtTheEnd(), callbacks.Metrics(folder / "metrics.jsonl")]
        if self.options.early_stopping_patience is not None:
            watchers.append(EarlyStoppingCallback(self.options.early_stopping_patience))
        with hf.loading(name):
            trainer = checkpoints.ResumableTrainer(
                name,
                args=config,
                train_dataset=self.train_rows,
                eval_dataset=self.eval_rows,
                processing_class=self.tokenizer,
                callbacks=watchers,
                quantization_config=get_quantization_config(model),
                peft_config=get_peft_config(model),
            )
        callbacks.show_bar(trainer, arm)
        if self.options.samples and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            raise ValueError("samples must be 0 under FSDP and DeepSpeed: a rank has no whole model to answer with")
        if arm == "plain":  # alpha_g = N_g / N undoes the importance weights N / N_g: the mean over pairs
            weights: Any = trainer.group_weights
            weights.log_alpha.copy_(weights.group_sizes.double().log().log_softmax(0))
        for dtype in {p.dtype for p in trainer.model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}:
            warnings.warn(f"small steps do not move {dtype} weights: leave --dtype at float32", stacklevel=2)
        return trainer
