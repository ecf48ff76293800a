"""Options inside and around groups: several ranks are one process. Run by test_ranks.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from cases import (
    EXACT,
    SIZES,
    alone,
    assert_equal_on_all_ranks,
    case,
    mean_over_ranks,
    pairs,
    part,
    rank_and_world,
    shares,
    weights,
)
from torch import Tensor

import grpo_kernels as gk

OPTIONS = {
    "auto": {"step_size": "auto"},
    "baseline": {"baseline": "running"},
    "worst up": {"inner_tilt": 0.4, "estimator": "group_mean"},
    "outliers down": {"inner_tilt": -0.4, "baseline": [0.5, 0.2, 0.1]},
    "power": {"rule": "power", "exponent": 2.0, "step_size": None},
}


def case_of_few_ranks(function: Callable[[], None]) -> Callable[[], None]:
    return case(function, (1, 2))


def memberships(batch: dict[str, Tensor]) -> Tensor:
    scores = torch.randn(len(batch["ids"]), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    return scores.softmax(1)


@case_of_few_ranks
def robust_options_over_ranks_are_one_process() -> None:
    """Three steps, one with an empty part, at once or lagged in two forwards: gradients, loss, the whole state."""
    rank, world = rank_and_world()
    group = alone()
    for update in ("inline", "lagged"):
        for name, options in [*OPTIONS.items(), ("shares", {}), ("shares tilted", {"inner_tilt": 0.4})]:
            ours, whole = (weights(of, update=update, **options) for of in (None, group))
            in_parts = update == "lagged" and ours.estimator == "importance"
            for step in range(3):
                batch = pairs(7, length=2, seed=step)
                if name.startswith("shares"):
                    batch["ids"] = memberships(batch)
                total = 7 if in_parts else None
                leaf = part(batch, slice(None))[0].requires_grad_()
                loss_fn = gk.GroupRobustLoss(whole, beta=0.5, backend="torch")
                expected = loss_fn(leaf, *part(batch, slice(None))[1:], total_pairs=total)
                (wanted,) = torch.autograd.grad(expected.loss, leaf)
                mine = torch.arange(7)[shares(7, world)[rank] if step != 1 else slice(7 * (rank == 0))]
                loss_fn, loss = gk.GroupRobustLoss(ours, beta=0.5, backend="torch"), 0.0
                for some in mine.tensor_split(2) if in_parts else [mine]:
                    local, *rest = part(batch, some)
                    out = loss_fn(local.requires_grad_(), *rest, total_pairs=total)
                    (grad,) = torch.autograd.grad(out.loss, local)
                    pieces = wanted.unflatten(0, (2, 7))[:, some].flatten(0, 1)
                    torch.testing.assert_close(grad / world, pieces, **EXACT, msg=lambda m, n=name: f"{n}: {m}")
                    loss = loss + out.loss.detach()
                if in_parts:
                    dist.all_reduce(loss)
                torch.testing.assert_close(loss, expected.loss.detach(), **EXACT)
                if update == "lagged":
                    ours.step()
                    whole.step()
                for buffer, value in whole.state_dict().items():
                    if value.is_floating_point():
                        torch.testing.assert_close(ours.state_dict()[buffer], value, **EXACT, equal_nan=True)
                assert_equal_on_all_ranks(ours.log_alpha)


@case_of_few_ranks
def a_tilted_linear_loss_over_ranks() -> None:
    """Lagged: the sweep's forecast holds on every rank; inline it has none."""
    rank, world = rank_and_world()
    group = alone()
    torch.manual_seed(1)
    hidden = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    head = torch.randn(11, 6, dtype=torch.float64).requires_grad_()
    for update in ("inline", "lagged"):
        ours, whole = (weights(of, update=update, inner_tilt=0.5, group_sizes=SIZES) for of in (None, group))
        for step in range(2):
            batch = pairs(5, seed=step)
            plan = "sweep" if update == "lagged" or world == 1 else "auto"
            results = []
            for of, which, how in ((whole, slice(None), "auto"), (ours, shares(5, world)[rank], plan)):
                _, labels, ids, ref = part(batch, which)
                loss_fn = gk.LinearGroupRobustLoss(of, backend="torch", plan=how)
                loss = loss_fn(hidden[:, which].flatten(0, 1), head, labels, ids, ref).loss
                results.append(torch.autograd.grad(loss, head)[0])
                if update == "lagged":
                    of.step()
            torch.testing.assert_close(mean_over_ranks(results[1]), results[0], **EXACT)
            torch.testing.assert_close(ours.log_alpha, whole.log_alpha, **EXACT)
