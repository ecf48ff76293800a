"""Groups that nobody has labelled, K given: `python examples/unknown_groups.py`.

EM finds each annotator's share in K types of preference, and one policy is trained robustly over the types. A policy a
type is fitted to the pairs in proportion to their shares (M step), and shares are in proportion to the likelihood of an
annotator's pairs under each (E step), as in Chakraborty et al. 2024 (arXiv:2402.08925). A type is found only if
annotators give several pairs each; which type gets which number is chance.
"""

import torch

import grpo_kernels as gk

ANNOTATORS, PAIRS_EACH, FEATURES, TYPES = 40, 10, 6, 2
RARE = 8  # annotators of the second type


def data(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, F): features of the chosen less the rejected answer, the annotator of each pair, each annotator's type."""
    tastes = torch.tensor(
        [[2.0, 2, 0, 1, 0, 0], [-1.0, 0, 2, 1, 2, 0]]
    )  # what each type likes; they agree on one feature
    types = (torch.arange(ANNOTATORS) < RARE).long()
    annotator = torch.arange(ANNOTATORS).repeat_interleave(PAIRS_EACH)
    differences = torch.randn(len(annotator), FEATURES, generator=generator)
    liked = (differences * tastes[types[annotator]]).sum(1)
    prefers_first = torch.rand(len(annotator), generator=generator) < torch.sigmoid(2 * liked)
    return torch.where(prefers_first.unsqueeze(1), differences, -differences), annotator, types


def pair_losses(theta: torch.Tensor, differences: torch.Tensor) -> torch.Tensor:
    """(N,) DPO losses of a log-linear policy, whose margin is <difference, theta>."""
    margins = differences @ theta
    return gk.preference_losses(torch.cat([margins, torch.zeros_like(margins)]), beta=1.0)


def shares_by_em(differences: torch.Tensor, annotator: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(ANNOTATORS, TYPES), rows adding up to 1."""
    thetas = torch.randn(TYPES, FEATURES, generator=generator).requires_grad_()
    optimizer, prior = torch.optim.Adam([thetas], lr=0.05), torch.full((TYPES,), 1 / TYPES)
    for _ in range(60):
        losses = torch.stack([pair_losses(theta, differences) for theta in thetas], 1)  # (N, TYPES)
        of_annotator = torch.zeros(ANNOTATORS, TYPES).index_add(0, annotator, losses.detach())
        shares = (prior.log() - of_annotator).softmax(1)  # E step: exp(-l) is the likelihood of a preference
        prior = shares.mean(0)
        for _ in range(5):  # M step
            losses = torch.stack([pair_losses(theta, differences) for theta in thetas], 1)
            optimizer.zero_grad()
            (shares[annotator] * losses).sum(1).mean().backward()
            optimizer.step()
    return shares


def train(differences: torch.Tensor, shares: torch.Tensor, step_size: float | str) -> torch.Tensor:
    """One policy for all, (F,); ``shares`` (N, TYPES) of each pair."""
    groups = gk.GroupWeights(TYPES, estimator="group_mean", step_size=step_size)
    loss_fn, theta = gk.GroupRobustLoss(groups), torch.zeros(FEATURES, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        loss_fn.from_pair_losses(pair_losses(theta, differences), shares).loss.backward()
        optimizer.step()
    return theta.detach()


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    differences, annotator, types = data(generator)
    shares = shares_by_em(differences, annotator, generator)
    found = shares.argmax(1) == types
    right = max(found.float().mean(), 1 - found.float().mean())  # the numbers of the types may be swapped
    print(f"annotators whose type is found: {right:.2f}")
    rare = types[annotator] == 1
    everyone = torch.ones(len(annotator), TYPES) / TYPES  # one policy that knows of no types
    for name, members, step_size in (("plain", everyone, 0.0), ("robust", shares[annotator], "auto")):
        losses = pair_losses(train(differences, members, step_size), differences)
        print(f"{name}: loss of the common type {losses[~rare].mean():.3f}, of the rare type {losses[rare].mean():.3f}")


if __name__ == "__main__":
    main()
