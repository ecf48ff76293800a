"""Trainers whose loss takes four (B,) log-probabilities: stand-ins with the signatures of the published ones.

Each trains a table of log-probabilities, so that a plain loop of a few lines is the truth.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grpo_kernels as gk
from grpo_kernels.integrations.four_logps import FourLogpsLoss, WithGroups, group_robust

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
needs_accelerate = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is missing")

SIZES, BETA, RATE, NUM_PAIRS = [6, 3], 0.5, 0.5, 9
REF = torch.linspace(-0.5, 0.5, 2 * NUM_PAIRS)


def pairs() -> list[dict[str, Any]]:
    return [{"pair": i, "group_ids": int(i % 3 == 0)} for i in range(NUM_PAIRS)]


def loss_of(update: str = "inline", **options: Any) -> gk.GroupRobustLoss:
    weights = gk.GroupWeights(group_sizes=SIZES, step_size=0.7, update=update)
    return gk.GroupRobustLoss(weights, **{"beta": BETA, **options})


class Table(nn.Module):
    """(B,) numbers of pairs to (2B,) log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(-torch.arange(2.0 * NUM_PAIRS).sin().abs())

    def forward(self, pair: Tensor) -> Tensor:
        return self.table[torch.cat([pair, pair + NUM_PAIRS])]


def collate(rows: list[dict[str, int]]) -> dict[str, Tensor]:
    assert all(set(row) == {"pair"} for row in rows), "the model would be given what it does not know"
    return {"pair": torch.tensor([row["pair"] for row in rows])}


class FourLogps(transformers.Trainer):
    """What the stand-ins share: the batch's way from get_batch_loss_metrics to the four log-probabilities."""

    def __init__(self, beta: float, loss_type: Any, **kwargs: Any) -> None:
        self.beta, self.loss_type, self.label_smoothing = beta, loss_type, 0.0
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = False

    def four(self, model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
        policy = model(**batch)
        ref = REF.to(policy.device)[torch.cat([batch["pair"], batch["pair"] + NUM_PAIRS])]
        return [*policy.chunk(2), *ref.chunk(2)]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        loss, metrics = self.get_batch_loss_metrics(model, inputs, train_eval="train")
        self.seen = metrics
        return (loss, metrics) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Any:
        with torch.no_grad():
            loss, _ = self.get_batch_loss_metrics(model, inputs, train_eval="eval")
        return loss, None, None


class LikeLlamaFactory(FourLogps):
    """LLaMA-Factory 0.9, src/llamafactory/train/dpo/trainer.py: CustomDPOTrainer."""

    ftx_gamma = bco_gemma = 0.0

    def compute_preference_loss(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor | None,
        reference_rejected_logps: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise AssertionError("this is what is replaced")

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Tensor], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        losses, chosen_rewards, rejected_rewards = self.compute_preference_loss(*self.four(model, batch))
        losses += self.ftx_gamma * torch.ones_like(losses)  # in place, as it is there
        prefix = "eval_" if train_eval == "eval" else ""
        return losses.mean(), {f"{prefix}rewards/margins": (chosen_rewards - rejected_rewards).mean().item()}


class LikeTRL(FourLogps):
    """TRL 0.24, trl/trainer/dpo_trainer.py: DPOTrainer. So are ms-swift 4 (swift/rlhf_trainers/dpo_trainer.py) and
    unsloth, which patches TRL's."""

    use_weighting = False

    def dpo_loss(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        loss_type: str = "sigmoid",
        model_output: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise AssertionError("this is what is replaced")

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Tensor], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total: Any = 0
        for loss_type in self.loss_type:
            losses, *_ = self.dpo_loss(*self.four(model, batch), loss_type, {"nll_loss": torch.zeros(())})
            total = total + losses
        return total.mean(), {}


def trainer(kind: type, out: Path, loss_fn: gk.GroupRobustLoss, **options: Any) -> Any:
    batch, accumulation = options.pop("batch", 3), options.pop("accumulation", 1)
    args = transformers.TrainingArguments(
        str(out),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        logging_steps=1,
        **{"num_train_epochs": 1, "save_strategy": "no", **options},
    )
    loss_type, rows = "sigmoid" if kind is LikeLlamaFactory else ["sigmoid"], pairs()
    if kind is LikeTRL:  # Trainer drops the columns of a Dataset that it does not know
        rows = pytest.importorskip("datasets").Dataset.from_list(rows)
    return group_robust(kind)(
        BETA,
        loss_type,
        model=Table(),
        args=args,
        data_collator=collate,
        train_dataset=rows,
        eval_dataset=rows,
        group_loss=loss_fn,
    )


def by_hand(loss_fn: gk.GroupRobustLoss, steps: list[range]) -> Table:
    """Each step in one batch."""
    model, ids = Table(), torch.tensor([row["group_ids"] for row in pairs()])
    for step in steps:
        which = torch.tensor(step)
        both = torch.cat([which, which + NUM_PAIRS])
        loss_fn.from_logps(model(which), ids[which], REF[both]).loss.backward()
        if loss_fn.group_weights.update_mode == "lagged":
            loss_fn.group_weights.step()
        with torch.no_grad():
            model.table -= RATE * model.table.grad
            model.table.grad = None
    return model


@needs_accelerate
@pytest.mark.parametrize("kind", [LikeLlamaFactory, LikeTRL])
@pytest.mark.parametrize(
    ("update", "accumulation", "batch", "steps"),
    [
        ("inline", 1, 4, [range(4), range(4, 8), range(8, 9)]),
        ("lagged", 3, 2, [range(6), range(6, 9)]),  # the last step: two micro-batches, the second of one pair
    ],
)
def test_a_trainer_trains_as_a_plain_loop(
    kind: type, update: str, accumulation: int, batch: int, steps: list[range], tmp_path: Path
) -> None:
    loss_fn, whole = loss_of(update), loss_of(update)
    made = trainer(kind, tmp_path, loss_fn, batch=batch, accumulation=accumulation)
    made.train()
    expected = by_hand(whole, steps)
    torch.testing.assert_close(made.model.table, expected.table, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss_fn.group_weights.alpha, whole.group_weights.alpha, rtol=1e-6, atol=1e-7)
    assert made.seen["groups/1/alpha"] == pytest.approx(float(whole.group_weights.alpha[1]), rel=0.5)
    before = loss_fn.group_weights.alpha
    assert made.evaluate()["eval_loss"] < 1
    assert torch.equal(loss_fn.group_weights.alpha, before), "evaluation moves nothing"


@needs_accelerate
def test_checkpoints_hold_alpha(tmp_path: Path) -> None:
    whole, again = loss_of(), loss_of()
    made = trainer(LikeLlamaFactory, tmp_path, whole, save_strategy="steps", save_steps=1)
    made.train()
    resumed = trainer(LikeLlamaFactory, tmp_path / "again", again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(resumed.model.table, made.model.table)
    assert torch.equal(again.group_weights.log_alpha, whole.group_weights.log_alpha)


@needs_accelerate
def test_what_would_be_ignored_is_refused(tmp_path: Path) -> None:
    for options, text in (
        ({"beta": 0.1}, "group_loss must have beta=0.5"),
        ({"loss_type": "ipo"}, "the trainer's one loss_type"),
        ({"label_smoothing": 0.2}, r"label_smoothing=0\.0"),
    ):
        with pytest.raises(ValueError, match=text):
            trainer(LikeLlamaFactory, tmp_path, loss_of(**options))
    with pytest.raises(ValueError, match="update='lagged'"):
        trainer(LikeLlamaFactory, tmp_path, loss_of(), accumulation=2)
    with pytest.raises(ValueError, match="chosen_first"):
        trainer(LikeLlamaFactory, tmp_path, loss_of(layout="interleaved"))
    with pytest.raises(NotImplementedError, match="use_weighting"):
        trainer(type("Weighing", (LikeTRL,), {"use_weighting": True}), tmp_path, loss_of())
    with pytest.raises(TypeError, match="get_batch_loss_metrics and one of"):
        group_robust(transformers.Trainer)
    made = trainer(LikeLlamaFactory, tmp_path, loss_of())
    made.train_dataset = [{"pair": 0}]
    with pytest.raises(ValueError, match="must have a column 'group_ids'"):
        made.train()


class LikeOpenRLHF:
    """OpenRLHF 0.8, openrlhf/trainer/dpo_trainer.py: DPOTrainer.fit, whose engine divides by the micro-batches."""

    def __init__(self, model: Table, train_dataloader: Any, accumulated_gradient: int) -> None:
        self.model, self.train_dataloader, self.accumulated_gradient = model, train_dataloader, accumulated_gradient
        self.loss_fn: Any = None
        self.losses: list[float] = []

    def fit(self) -> None:
        for step, data in enumerate(self.train_dataloader, 1):
            (pair,) = data
            chosen, rejected = self.model(pair).chunk(2)
            ref_chosen, ref_rejected = REF[torch.cat([pair, pair + NUM_PAIRS])].chunk(2)
            loss, chosen_rewards, rejected_rewards = self.loss_fn(chosen, rejected, ref_chosen, ref_rejected)
            assert chosen_rewards.shape == rejected_rewards.shape == pair.shape
            self.losses.append(loss.item())
            (loss / self.accumulated_gradient).backward()
            if step % self.accumulated_gradient == 0:
                with torch.no_grad():
                    self.model.table -= RATE * self.model.table.grad
                    self.model.table.grad = None


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_loop_that_calls_a_loss_of_four(accumulation: int) -> None:
    rows = WithGroups(range(NUM_PAIRS), [row["group_ids"] for row in pairs()])
    as_tuple = rows.collate(lambda items: (torch.tensor(items),))
    loader = torch.utils.data.DataLoader(rows, batch_size=3, collate_fn=as_tuple, drop_last=True)
    loss_fn, whole = loss_of("lagged"), loss_of("lagged")
    loop = LikeOpenRLHF(Table(), loader, accumulation)
    loop.loss_fn = FourLogpsLoss(loss_fn, accumulation)
    loop.train_dataloader = loop.loss_fn.reading(loader)
    assert len(loop.train_dataloader) == 3
    assert loop.train_dataloader.sampler is loader.sampler
    loop.fit()
    steps = [range(i, i + 3 * accumulation) for i in range(0, NUM_PAIRS, 3 * accumulation)]
    expected = by_hand(whole, steps)
    torch.testing.assert_close(loop.model.table, expected.table, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss_fn.group_weights.alpha, whole.group_weights.alpha, rtol=1e-6, atol=1e-7)
    first = torch.cat([torch.arange(3 * accumulation), torch.arange(3 * accumulation) + NUM_PAIRS])
    alike = loss_of("lagged").from_logps(Table()(torch.arange(3 * accumulation)), *_ids_and_ref(first))
    assert sum(loop.losses[:accumulation]) / accumulation == pytest.approx(alike.loss.item(), rel=1e-5)
    with pytest.raises(ValueError, match="accumulation_steps must be finite and in"):
        FourLogpsLoss(loss_of(), accumulation_steps=0)
    with pytest.raises(RuntimeError, match="group_ids must be set for each batch"):
        loop.loss_fn(*[torch.zeros(3)] * 4)


def _ids_and_ref(both: Tensor) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([row["group_ids"] for row in pairs()])
    return ids[both[: len(both) // 2]], REF[both]


def test_without_a_reference() -> None:
    """SimPO and others hand over None; a reference-free loss leaves what it is given."""
    four = FourLogpsLoss(loss_of(reference_free=True))
    chosen, rejected = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.0])
    for reference in ((None, None), (torch.ones(2), torch.zeros(2))):
        four.group_ids = torch.tensor([0, 0])
        loss, *_ = four(chosen, rejected, *reference)
        plain = -F.logsigmoid(BETA * (chosen - rejected)).sum() * 9 / 6 / 2
        alpha = four.loss_fn.group_weights.alpha[0]
        torch.testing.assert_close(loss.double(), alpha * plain.double())


def test_group_ids_are_as_many_as_rows() -> None:
    with pytest.raises(ValueError, match="one id for each of 3 rows, got 2"):
        WithGroups(range(3), [0, 1])
