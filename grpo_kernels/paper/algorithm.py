"""Algorithm 1 of Ramesh et al. 2024 (docs/method.md) for any differentiable policy, and its projections.

    alpha = uniform;  for t = 1..T:
        draw g ~ Categorical(N_1/N .. N_K/N);  draw (x, y_w, y_l) from group g
        alpha_g <- alpha_g exp(eta L_g), normalised;  theta <- P_Theta(theta - eta_theta (N alpha_g / N_g) grad l)

The loss and alpha are the package's GroupRobustLoss and GroupWeights: nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from grpo_kernels import validation
from grpo_kernels.groups.sampling import GroupBatchSampler
from grpo_kernels.losses import GroupRobustLoss
from grpo_kernels.types import GroupRobustOutput

Projection = Callable[[Tensor], Tensor]
"""theta (..., n) -> its nearest point of Theta, for each vector of the last dimension."""

Policy = Callable[[Tensor], Tensor]
"""Indices (B,) of pairs -> log-ratios (2B,) against the reference policy, chosen first, or their margins h (B,)."""

SAMPLING = ("group", "uniform")


def identity(theta: Tensor) -> Tensor:
    """Theta is the whole space."""
    return theta


def l2_ball(radius: float, centre: Tensor | float = 0.0) -> Projection:
    """Theta = {theta: |theta - centre| <= radius}.

    Example:
        >>> l2_ball(5.0)(torch.tensor([6.0, 8.0]))
        tensor([3., 4.])
    """
    validation.check_number("radius", radius, 0.0, open_low=True)

    def project(theta: Tensor) -> Tensor:
        from_centre = theta - centre
        norm = torch.linalg.vector_norm(from_centre, dim=-1, keepdim=True)
        return centre + from_centre * (radius / norm.clamp(min=radius))

    return project


def box(low: float, high: float) -> Projection:
    """Theta = [low, high]^n."""
    validation.check_number("low", low, -float("inf"))
    validation.check_number("high", high, low)
    return lambda theta: theta.clamp(low, high)


def simplex(total: float = 1.0) -> Projection:
    """Theta = {theta >= 0 with sum ``total``}: theta - c, cut off at 0, with c such that the sum is right.

    Example:
        >>> simplex()(torch.tensor([0.9, 0.7, -3.0]))
        tensor([0.6000, 0.4000, 0.0000])

    Source: Held, Wolfe and Crowder 1974; Duchi et al. 2008.
    """
    validation.check_number("total", total, 0.0, open_low=True)

    def project(theta: Tensor) -> Tensor:
        descending = theta.sort(-1, descending=True).values
        ranks = torch.arange(1, theta.shape[-1] + 1, device=theta.device)
        cuts = (descending.cumsum(-1) - total) / ranks  # c, if the so many largest stay positive
        positive = (descending > cuts).sum(-1, keepdim=True)
        return (theta - cuts.gather(-1, positive - 1)).clamp(min=0)

    return project


@dataclass(frozen=True)
class AverageIterates:
    """Means over the T points (theta, alpha) at which the gradients were taken, which the theory is about."""

    theta: Tensor
    """(n,) all parameters in one vector; ``torch.nn.utils.vector_to_parameters`` puts them back."""
    alpha: Tensor
    """(K,) float64: the weights that the losses were weighed with."""


def run_algorithm(
    policy: Policy,
    group_ids: Tensor,
    loss_fn: GroupRobustLoss,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    batch_size: int = 1,
    sampling: str = "group",
    projection: Projection = identity,
    seed: int = 0,
    on_step: Callable[[int, GroupRobustOutput], None] | None = None,
) -> AverageIterates:
    """Run T steps; the last iterate is left in the optimizer's parameters and in ``loss_fn.group_weights``.

    ``GroupWeights(update="inline")`` moves alpha first and theta with the new alpha, as the paper does;
    ``update="lagged"`` moves both from the same point, as the theory has it.

    Args:
        policy: differentiable in the optimizer's parameters.
        group_ids: (N,) the group of each pair, in [0, K).
        loss_fn: beta, the loss type and alpha. Its weights need estimator="importance" and the pairs' group sizes.
        optimizer: plain ``torch.optim.SGD`` is the paper's step.
        steps: T.
        batch_size: pairs a step; 1 is the paper's algorithm.
        sampling: "group": g ~ Categorical(N_g / N) (algorithm 1). "uniform": each group alike, and the factor
            N / N_g left out of both steps (algorithm 3).
        projection: P_Theta, applied to the vector of all parameters after each step.
        seed: of the draws.
        on_step: called as on_step(t, output of the loss) after each step, t from 1.

    Raises:
        ValueError: an argument is out of its range; the message names it.

    Source: Ramesh et al. 2024, algorithms 1 (DPO; 2 for IPO) and 3.
    """
    weights = loss_fn.group_weights
    validation.check_whole_number("steps", steps, 1)
    validation.check_choice("sampling", sampling, SAMPLING)
    sizes = torch.bincount(group_ids, minlength=weights.num_groups)
    given = weights.group_sizes
    if weights.estimator != "importance" or given is None or given.tolist() != sizes.tolist():
        raise ValueError(
            f"loss_fn.group_weights must have estimator='importance' and group_sizes={sizes.tolist()}, those of "
            f"group_ids; got estimator={weights.estimator!r} and {None if given is None else given.tolist()}"
        )
    sampler = GroupBatchSampler(group_ids, batch_size, sampling, seed=seed)
    parameters = [p for entry in optimizer.param_groups for p in entry["params"]]
    theta_sum = torch.zeros_like(parameters_to_vector(parameters), dtype=torch.float64)
    alpha_sum = torch.zeros_like(weights.log_alpha)
    weights.train()
    for step in range(steps):
        indices = torch.tensor(sampler.batch(step), device=group_ids.device)
        theta_sum += parameters_to_vector(parameters).detach()
        if weights.update_mode == "lagged":
            alpha_sum += weights.alpha
        ids = group_ids[indices]
        # N_g / N takes back the importance estimator's N / N_g.
        factors = sizes[ids].double() / sizes.sum() if sampling == "uniform" else None
        out = _loss(loss_fn, policy(indices), ids, factors)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if weights.update_mode == "lagged":
            weights.step()
        else:
            alpha_sum += weights.alpha
        if projection is not identity:
            with torch.no_grad():
                vector_to_parameters(projection(parameters_to_vector(parameters)), parameters)
        if on_step is not None:
            on_step(step + 1, out)
    return AverageIterates(theta_sum / steps, alpha_sum / steps)


def _loss(loss_fn: GroupRobustLoss, scores: Tensor, ids: Tensor, factors: Tensor | None) -> GroupRobustOutput:
    num_pairs = ids.shape[0]
    if scores.shape not in ((num_pairs,), (2 * num_pairs,)):
        raise ValueError(
            f"policy must return ({num_pairs},) margins or ({2 * num_pairs},) log-ratios for {num_pairs} pairs, "
            f"got {tuple(scores.shape)}"
        )
    if scores.shape == (num_pairs,):  # a margin is a log-ratio of the chosen answer against one of 0
        scores = torch.cat([scores, torch.zeros_like(scores)])
    reference = None if loss_fn.reference_free else torch.zeros_like(scores, requires_grad=False)
    if factors is not None:
        factors = factors.to(scores.dtype)
    return loss_fn.from_logps(scores, ids, reference, weights=factors)
