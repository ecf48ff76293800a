"""Pair losses: the table against the formulas, derivatives against autograd, options per pair."""

from __future__ import annotations

import math

import pytest
import torch
import truth

import grpo_kernels as gk

CASES = [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0), ("hinge", 0.0), ("robust", 0.0), ("robust", 0.3)]


def logps_with_margin(h: torch.Tensor) -> torch.Tensor:
    return torch.cat([h / 2, -h / 2])


@pytest.mark.parametrize(("loss_type", "e"), CASES)
@pytest.mark.parametrize("beta", [1e-3, 0.1, 2.0])
def test_value_and_derivative(loss_type: str, e: float, beta: float) -> None:
    h = torch.tensor([-800.0, -3.0, -1e-3, 0.0, 0.7, 11.0, 25.0, 900.0], dtype=torch.float64)
    logps = logps_with_margin(h).requires_grad_()
    losses = gk.preference_losses(logps, beta=beta, loss_type=loss_type, label_smoothing=e)
    values, slopes = zip(*(truth.pair_loss(x, beta, loss_type, e) for x in h.tolist()), strict=True)
    torch.testing.assert_close(losses, torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=1e-15)
    (grad,) = torch.autograd.grad(losses.sum(), logps)
    expected = torch.tensor(slopes, dtype=torch.float64)
    torch.testing.assert_close(grad[:8], expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(grad[8:], -expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("loss_type", "e"), CASES)
def test_gradcheck_through_the_public_function(loss_type: str, e: float) -> None:
    logps = torch.randn(8, dtype=torch.float64).requires_grad_()
    ref_logps, weights = torch.randn(8, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: gk.preference_losses(
            x, ref_logps, beta=0.7, loss_type=loss_type, label_smoothing=e, weights=weights, margin=weights / 3
        ),
        logps,
    )


def test_loss_is_lower_when_chosen_is_likelier() -> None:
    """The sign that the write-up had wrong: minus log sigmoid, so pushing the chosen answer up lowers the loss."""
    logps = torch.zeros(2, requires_grad=True)
    loss = gk.preference_losses(logps, beta=0.5)
    (grad,) = torch.autograd.grad(loss.sum(), logps)
    assert loss.item() == pytest.approx(math.log(2))
    assert grad.tolist() == [-0.25, 0.25]


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "robust"])
def test_well_separated_pairs_get_less_gradient(loss_type: str) -> None:
    logps = logps_with_margin(torch.tensor([0.5, 30.0])).requires_grad_()
    (grad,) = torch.autograd.grad(gk.preference_losses(logps, beta=0.5, loss_type=loss_type).sum(), logps)
    assert grad[1].abs() < grad[0].abs() / 100


def test_chosen_equal_to_rejected() -> None:
    for loss_type, value in {"sigmoid": math.log(2), "ipo": 25.0, "hinge": 1.0, "robust": math.log(2)}.items():
        loss = gk.preference_losses(torch.tensor([-7.0, -7.0]), beta=0.1, loss_type=loss_type)
        assert loss.item() == pytest.approx(value)


def test_the_reference_is_subtracted_once() -> None:
    policy, ref = torch.tensor([-5.0, -9.0]), torch.tensor([-6.0, -7.0])
    h = (-5.0 - -6.0) - (-9.0 - -7.0)
    assert gk.preference_losses(policy, ref, beta=0.2).item() == pytest.approx(truth.pair_loss(h, 0.2, "sigmoid")[0])


def test_vectors_for_each_pair() -> None:
    h, betas = [1.0, -2.0, 4.0], [0.1, 0.5, 2.0]
    targets, factors = [0.5, 0.0, 3.0], [1.0, 2.0, 0.0]
    losses = gk.preference_losses(
        logps_with_margin(torch.tensor(h)),
        beta=torch.tensor(betas),
        margin=torch.tensor(targets),
        weights=torch.tensor(factors),
    )
    expected = [
        w * truth.pair_loss(x - m, b, "sigmoid")[0] for x, b, m, w in zip(h, betas, targets, factors, strict=True)
    ]
    torch.testing.assert_close(losses, torch.tensor(expected))


def test_small_differences_of_long_sequences_survive() -> None:
    policy = torch.tensor([-812.3, -811.9])
    assert gk.preference_losses(policy, beta=1.0).item() == pytest.approx(
        truth.pair_loss(-0.4, 1.0, "sigmoid")[0], 1e-3
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta": -0.1}, ValueError, r"beta must be finite and in \(0.0, inf\), got -0.1"),
        ({"beta": 0.0}, ValueError, "beta must be finite"),
        ({"beta": float("nan")}, ValueError, "beta must be finite"),
        ({"beta": "0.1"}, TypeError, "beta must be a number, got str"),
        ({"beta": torch.ones(3)}, ValueError, r"beta must have shape \(2,\), one for each pair, got \(3,\)"),
        ({"loss_type": "dpo"}, ValueError, "got 'dpo': DPO is called 'sigmoid'"),
        ({"label_smoothing": 0.5}, ValueError, r"label_smoothing must be finite and in \[0.0, 0.5\), got 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, ValueError, "label_smoothing has no meaning"),
        ({"weights": torch.ones(4)}, ValueError, r"weights must have shape \(2,\)"),
        ({"margin": torch.ones(2, dtype=torch.int64)}, TypeError, "margin must be float32"),
        ({"weights": torch.ones(2, requires_grad=True)}, ValueError, "weights is a constant of the loss"),
        ({"ref_logps": torch.ones(2)}, ValueError, r"ref_logps must have shape \(4,\), one for each sequence"),
        ({"ref_logps": torch.ones(4, requires_grad=True)}, ValueError, "ref_logps is a constant"),
        ({"policy_logps": torch.zeros(3)}, ValueError, r"policy_logps must have shape \(2B,\)"),
        ({"policy_logps": torch.zeros(4, dtype=torch.int64)}, TypeError, "policy_logps must be float32"),
        ({"policy_logps": [0.0] * 4}, TypeError, "policy_logps must be a torch.Tensor, got list"),
    ],
)
def test_bad_input(options: dict, error: type[Exception], message: str) -> None:
    arguments = {"policy_logps": torch.zeros(4), "ref_logps": None, "beta": 0.1, **options}
    with pytest.raises(error, match=message):
        gk.preference_losses(**arguments)
