"""Full-batch GR-DPO and GR-IPO of log-linear policies, for many data sets and methods in one tensor program.

The loss of a pair and the step of alpha are the package's own (PAIR_LOSSES, moved_log_alpha); only what surrounds them
is batched here. Dimensions: D data sets, N pairs, M methods, K groups, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grpo_kernels.groups.rules import moved_log_alpha
from grpo_kernels.pair_losses import PAIR_LOSSES, of_h


@contextmanager
def one_thread() -> Iterator[None]:
    """For tensors as small as those here: handing work to other threads costs more than it saves (measured: 1 ms an
    iteration of the experiment on one thread, up to 15 on two of a busy machine)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Method:
    """A weighting of the group losses: q = (1 - chi) * base + chi * alpha, and alpha moves by chi * L.

    DPO and IPO: base = N_g / N, chi = 0. Importance sampling: base = 1 / K, chi = 0. Group-robust: chi = 1.
    """

    name: str
    chi: float
    base_is_sizes: bool = False


METHODS = (Method("plain", 0.0, base_is_sizes=True), Method("importance", 0.0), Method("robust", 1.0))


@dataclass(frozen=True)
class PairBatch:
    """Margins are h = differences @ theta."""

    differences: Tensor
    """(D, F, N) float64: pairs last, where the products below are fastest."""
    membership: Tensor
    """(D, K, N): 1 / N_g where a pair is of group g, else 0. So sums over N are means over the group."""

    @classmethod
    def of(cls, differences: Sequence[Tensor], group_ids: Sequence[Tensor], num_groups: int) -> PairBatch:
        """From (N, F) and (N,) of each data set."""
        member = torch.nn.functional.one_hot(torch.stack(list(group_ids)), num_groups).double().mT.contiguous()
        return cls(torch.stack(list(differences)).mT.contiguous(), member / member.sum(-1, keepdim=True))

    def shares(self) -> Tensor:
        """(D, 1, K): N_g / N."""
        sizes = (self.membership > 0).double().sum(-1).unsqueeze(1)
        return sizes / sizes.sum(-1, keepdim=True)

    def margins(self, theta: Tensor) -> Tensor:
        """(D, M, N) from theta (D, M, F)."""
        return theta @ self.differences

    def group_losses(self, theta: Tensor, loss_type: str, beta: float) -> Tensor:
        """(D, M, K): mean pair loss of each group."""
        return PAIR_LOSSES[loss_type].value(of_h(self.margins(theta)), beta, 0.0) @ self.membership.mT


@dataclass
class Runs:
    """The state of D x M runs, and what was recorded on the way."""

    theta: Tensor
    """(D, M, F)."""
    log_alpha: Tensor
    """(D, M, K)."""
    iterations: list[int] = field(default_factory=list)
    alphas: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    """(D, M, K) each: group losses on the validation pairs."""


ThetaStep = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(theta, margins (D, M, N), weights of the groups q (D, M, K)) -> theta."""


def gradient_step(train: PairBatch, loss_type: str, beta: float, rate: float) -> ThetaStep:
    """theta - rate * grad sum_g q_g L_g."""

    def step(theta: Tensor, margins: Tensor, group_weights: Tensor) -> Tensor:
        slopes = PAIR_LOSSES[loss_type].slopes(of_h(margins), beta, 0.0)[0]
        return theta - rate * (slopes * (group_weights @ train.membership)) @ train.differences.mT

    return step


def closed_form_step(train: PairBatch, beta: float) -> ThetaStep:
    """The minimiser of sum_g q_g L_g for IPO: 1/(2 beta) (S^T W S)^-1 S^T W 1 with W = diag(q_{g_i} / N_{g_i}).

    q is a weight on the group's mean, so the counts divide once. (The authors' released code divides twice.)
    """
    grams = torch.einsum("dkn,dfn,den->dkfe", train.membership, train.differences, train.differences)
    means = torch.einsum("dkn,dfn->dkf", train.membership, train.differences)

    def step(theta: Tensor, margins: Tensor, group_weights: Tensor) -> Tensor:
        gram = torch.einsum("dmk,dkfe->dmfe", group_weights, grams)
        return torch.linalg.solve(gram, group_weights @ means) / (2 * beta)

    return step


@dataclass(frozen=True)
class Setting:
    """A pair loss and the step size of alpha."""

    loss_type: str
    beta: float
    step_size: float


@torch.no_grad()
def run_full_batch(
    train: PairBatch,
    validation: PairBatch,
    theta: Tensor,
    methods: Sequence[Method],
    theta_step: ThetaStep,
    setting: Setting,
    *,
    iterations: int,
    record_every: int,
    on_record: Callable[[int, float], None] = lambda done, worst_loss: None,
) -> Runs:
    """Each iteration: group losses at theta -> step of alpha -> theta_step with the new weights.

    Args:
        theta: (D, F) where each data set's runs start.
    """
    chi = torch.tensor([method.chi for method in methods], dtype=torch.float64).unsqueeze(1)  # (M, 1)
    takes_sizes = torch.tensor([method.base_is_sizes for method in methods]).unsqueeze(1)
    shares = train.shares()
    uniform = torch.full_like(shares, 1 / shares.shape[-1])
    base = torch.where(takes_sizes, shares, uniform)  # (D, M, K)
    runs = Runs(theta.unsqueeze(1).expand(-1, len(methods), -1).clone(), uniform.log().expand_as(base).clone())
    present, log_prior = torch.ones_like(base, dtype=torch.bool), torch.zeros_like(base)
    for iteration in range(iterations + 1):
        if iteration % record_every == 0 or iteration == iterations:
            runs.iterations.append(iteration)
            runs.alphas.append(runs.log_alpha.exp())
            runs.losses.append(validation.group_losses(runs.theta, setting.loss_type, setting.beta))
            on_record(iteration, float(runs.losses[-1].amax(-1).mean()))
        if iteration == iterations:
            break
        margins = train.margins(runs.theta)
        losses = PAIR_LOSSES[setting.loss_type].value(of_h(margins), setting.beta, 0.0) @ train.membership.mT
        runs.log_alpha = moved_log_alpha(
            runs.log_alpha, chi * losses, present, log_prior, rule="exponentiated_gradient", parameter=setting.step_size
        )
        weights = (1 - chi) * base + chi * runs.log_alpha.exp()
        runs.theta = theta_step(runs.theta, margins, weights)
    return runs
