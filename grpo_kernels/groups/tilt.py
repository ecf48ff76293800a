"""``inner_tilt``: inside a group its pairs weigh exp(l_i / tau), so that L_g is the tilted mean of their losses.

    T_g = tau log( (1/n_g) sum_{i in g} exp(l_i / tau) )      dT_g / dl_i = exp(l_i / tau) / sum_{j in g} exp(l_j / tau)

tau > 0: the worst pairs count more (KLDPO, arXiv:2502.01930: robust to a shift of preferences inside the group).
tau < 0: the worst count less, as outliers that noise has made (Dr. DPO, arXiv:2407.07880, with its beta' = -tau). Large
|tau| is the mean. The sum S_g of pair losses becomes n_g T_g, and all that follows is as without.

In one forward of the whole batch the sum over j is the batch's, over all ranks. With ``update="lagged"`` a step's sum
is known only after its last forward; as alpha is that of the last step, so is the tilted mean nu_g of a group. The loss
is then, with t = (l_i - nu_g) / tau, the sum of nu_g + tau (exp(t) - 1): where nu_g is T_g it has T_g's value and
slopes, it adds up over forwards and ranks, and needs no communication. A group's first step is untilted. Alpha is moved
by T_g of the whole step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_kernels.groups.memberships import Memberships

MAX_EXPONENT = 60.0  # of a pair's weight against the last step's tilted mean: e^60 holds in float32


def tilted_means(log_sums: Tensor, counts: Tensor, tau: float) -> Tensor:
    """(K,) T_g from log sum_i exp(l_i / tau); 0 for a group without a pair."""
    return torch.where(counts > 0, tau * (log_sums - counts.double().log()), 0)


def sums_of_batch(losses: Tensor, members: Memberships, tau: float, ranks: dist.ProcessGroup | None) -> Tensor:
    """(K,) this rank's part of n_g T_g, with its own pairs' gradient; T_g is over ``ranks``, None: this rank alone."""
    scores = losses.detach().double() / tau
    log_sums, own_counts = members.log_sum_exp(scores), members.counts()
    counts = own_counts
    if ranks is not None:
        log_sums, counts = over_ranks(log_sums, own_counts, ranks)
    log_means = torch.where(counts > 0, log_sums - counts.double().log(), torch.inf)  # no pair: no weight
    weights = (_across(scores, members) - members.of_pairs(log_means)).exp()
    values = own_counts * tilted_means(log_sums, counts, tau)
    return _with_slopes(values, weights, losses, members)


def sums_of_forward(losses: Tensor, members: Memberships, tau: float, means: Tensor) -> Tensor:
    """(K,) the forward's part of the loss around ``means`` (K,), the last step's; NaN there: untilted."""
    nu = members.of_pairs(means)
    from_mean = _across(losses.detach().double(), members) - nu
    weights = (from_mean / tau).clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
    values = torch.where(nu.isnan(), _across(losses.detach().double(), members), nu + tau * (weights - 1))
    return _with_slopes(members.sums(values), torch.where(nu.isnan(), 1, weights), losses, members)


def over_ranks(log_sums: Tensor, counts: Tensor, ranks: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """log sums and counts of all ranks, the same on each to the bit, by one all-gather of 2K float64."""
    own = torch.stack([log_sums, counts.double()])
    everyones = own.new_empty(2 * dist.get_world_size(ranks), own.shape[1])
    dist.all_gather_into_tensor(everyones, own, group=ranks)
    everyones = everyones.view(-1, *own.shape)
    return everyones[:, 0].logsumexp(0), everyones[:, 1].sum(0).to(counts.dtype)


def _across(values: Tensor, members: Memberships) -> Tensor:
    """(B,), or of weights (B, 1)."""
    return values.unsqueeze(1) if members.is_soft else values


def _with_slopes(values: Tensor, weights: Tensor, losses: Tensor, members: Memberships) -> Tensor:
    """``values``, with the gradient of sum_i w_i l_i. A loss that is not finite is not hidden by a weight of 0."""
    linear = members.sums(weights.detach() * _across(losses, members))
    return values + (linear - linear.detach())
