"""What the losses refuse, and what they make of ids and numbers that they cannot refuse without reading them."""

from __future__ import annotations

import pytest
import torch
from loss_cases import SIZES, ids, inputs, make

import grpo_kernels as gk


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"logits": lambda x: x[:7], "labels": lambda x: x[:7]},
            ValueError,
            "even number of sequences, chosen first and then rejected, got 7",
        ),
        ({"logits": lambda x: x.sum()}, ValueError, r"logits must have 3 dimensions, .* got shape \(\)"),
        ({"logits": lambda x: x[:, 0]}, ValueError, "logits must have 3 dimensions"),
        ({"logits": lambda x: x.long()}, TypeError, "logits must be float32, bfloat16, float16 or float64, got"),
        ({"logits": lambda x: x.tolist()}, TypeError, "must be a torch.Tensor, got list"),
        ({"logits": lambda x: x[..., :0]}, ValueError, "must not have an empty last dimension"),
        ({"labels": lambda x: x[:, :3]}, ValueError, r"labels must have shape \(8, 7\), one for each row of logits"),
        ({"labels": lambda x: x.float()}, TypeError, "labels must be int64 or int32, got torch.float32"),
        ({"labels": lambda x: x.to("meta")}, ValueError, "labels must be on logits's device cpu, got meta"),
        ({"group_ids": lambda x: x[:3]}, ValueError, r"group_ids must have shape \(4,\), one id for each pair"),
        ({"group_ids": lambda x: x.double()}, TypeError, "group_ids must be int64 or int32"),
        ({"ref_logps": lambda x: None}, ValueError, "ref_logps must be given"),
        ({"ref_logps": lambda x: x[:4]}, ValueError, r"ref_logps must have shape \(8,\)"),
        ({"cu_seqlens": lambda x: torch.arange(9)}, ValueError, "logits must have 2 dimensions"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], message: str) -> None:
    logits, labels, ref = inputs()
    arguments = {"logits": logits, "labels": labels, "group_ids": ids(), "ref_logps": ref, "cu_seqlens": None}
    arguments.update({name: mend(arguments[name]) for name, mend in change.items()})
    with pytest.raises(error, match=message):
        make()(**arguments)


@pytest.mark.parametrize(
    ("ends", "message"),
    [([0, 20, 55], "cu_seqlens must rise from 0 to 56"), ([0, 60, 56], "rise"), ([1, 20, 56], "rise")],
)
def test_bad_cu_seqlens(ends: list[int], message: str) -> None:
    logits, labels, ref = inputs()
    with pytest.raises(ValueError, match=message):
        make()(logits.flatten(0, 1), labels.flatten(), ids()[:1], ref[:2], torch.tensor(ends))


def test_cu_seqlens_as_a_list() -> None:
    logits, labels, ref = inputs()
    with pytest.raises(TypeError, match=r"cu_seqlens must be a torch\.Tensor, got list"):
        make()(logits.flatten(0, 1), labels.flatten(), ids()[:1], ref[:2], [0, 20, 56])


def test_bad_options() -> None:
    weights = gk.GroupWeights(group_sizes=SIZES, step_size=0.1)
    with pytest.raises(ValueError, match="beta must be finite and in"):
        gk.GroupRobustLoss(weights, beta=-1.0)
    with pytest.raises(TypeError, match="group_weights must be a GroupWeights, got list"):
        gk.GroupRobustLoss([0.5, 0.5])
    loss_fn = gk.GroupRobustLoss(weights, reference_free=True)
    with pytest.raises(ValueError, match="ref_logps must be None when reference_free=True"):
        loss_fn(*inputs()[:2], ids(), ref_logps=torch.zeros(8))
    with pytest.raises(TypeError, match="'token_weights' is no option here; there are beta, margin, weights"):
        loss_fn.from_logps(torch.zeros(8), ids(), token_weights=torch.ones(8))
    with pytest.raises(TypeError, match=r"weight must be float32, bfloat16, float16 or float64, got torch.int64"):
        gk.linear_sequence_logps(torch.zeros(2, 3, 4), torch.zeros(5, 4).long(), torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match=r"weight must have shape \(V, 4\), got \(5, 6\)"):
        gk.linear_sequence_logps(torch.zeros(2, 3, 4), torch.zeros(5, 6), torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match=r"weight must have a row for each token .*, got shape \(0, 4\)"):
        gk.linear_sequence_logps(torch.zeros(2, 3, 4), torch.zeros(0, 4), torch.zeros(2, 3).long())
    lagged = gk.GroupRobustLoss(gk.GroupWeights(group_sizes=SIZES, step_size=0.1, update="lagged"), reference_free=True)
    with pytest.raises(ValueError, match=r"total_pairs must be one number, got shape \(3,\)"):
        lagged.from_logps(torch.zeros(8), ids(), total_pairs=torch.tensor([2, 1, 1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probabilities_in_half_precision_are_refused(dtype: torch.dtype) -> None:
    """At -800 bfloat16 has steps of 4: the margin would be noise."""
    logps, rounded, ids = torch.full((4,), -600.0), torch.full((4,), -600.0, dtype=dtype), torch.tensor([0, 1])
    for call in (gk.preference_losses, lambda *given: make().from_logps(given[0], ids, given[1])):
        for name, given in {"policy_logps": (rounded, logps), "ref_logps": (logps, rounded)}.items():
            with pytest.raises(
                TypeError, match=f"{name} must be float32 or float64, got {dtype}.*MixedPrecisionPolicy"
            ):
                call(*given)
    logits, labels = torch.randn(4, 3, 7), torch.ones(4, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match="ref_logps must be float32 or float64"):
        make()(logits, labels, ids, rounded)
    with pytest.raises(TypeError, match="ref_logps must be float32 or float64"):
        gk.LinearGroupRobustLoss(make().group_weights)(logits, torch.randn(5, 7), labels, ids, rounded)


def test_group_weights_on_another_device() -> None:
    loss_fn, ref = make(), torch.zeros(8)
    with pytest.raises(ValueError, match="group_weights must be on the batch's device meta, got cpu: move the loss"):
        loss_fn.from_logps(ref.to("meta"), ids().to("meta"), ref.to("meta"))


def test_inplace_backward_refuses_expanded_logits(backend: str) -> None:
    labels = torch.zeros(8, 5, dtype=torch.int64)
    logits = torch.randn(1, 5, 9, requires_grad=True).expand(8, 5, 9)
    loss_fn = make(backend, inplace_backward=True, reference_free=True)
    if backend != "reference":
        with pytest.raises(ValueError, match="inplace_backward must be False for logits that were expanded"):
            loss_fn(logits, labels, ids())


@pytest.mark.parametrize("bad_id", [-1, 3, 10**9])
def test_a_group_id_outside_the_range(backend: str, bad_id: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels, ref = inputs()
    ids = torch.tensor([1, 0, bad_id, 1])
    loss_fn = make(backend)
    before = loss_fn.group_weights.log_alpha.clone()
    with pytest.warns(RuntimeWarning, match="alpha was not updated"):
        out = loss_fn(logits, labels, ids, ref_logps=ref)
    assert out.loss.isnan()
    assert torch.equal(loss_fn.group_weights.log_alpha, before)
    monkeypatch.setenv("GRPO_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=rf"group_ids must be in \[0, 3\), got {bad_id}"):
        loss_fn(logits, labels, ids, ref_logps=ref)


def test_a_nan_logit_gives_a_nan_loss_and_keeps_alpha(backend: str) -> None:
    logits, labels, ref = inputs()
    broken = logits.detach().clone()
    broken[1, 3] = torch.nan
    loss_fn = make(backend)
    before = loss_fn.group_weights.log_alpha.clone()
    with pytest.warns(RuntimeWarning, match="alpha was not updated"):
        assert loss_fn(broken.requires_grad_(), labels, ids(), ref_logps=ref).loss.isnan()
    assert torch.equal(loss_fn.group_weights.log_alpha, before)


def test_an_overflow_of_the_group_losses_is_skipped() -> None:
    weights = gk.GroupWeights(group_sizes=SIZES, step_size=0.3)
    with pytest.warns(RuntimeWarning, match="not finite"):
        weights.update(torch.tensor([1.0, 2.0, 1e308], dtype=torch.float64), torch.tensor([1, 1, 1]))
    assert int(weights.skipped_updates) == 1
    assert weights.alpha.tolist() == pytest.approx([1 / 3] * 3)


def test_int32_labels_and_ids(backend: str) -> None:
    logits, labels, ref = inputs()
    a = make(backend)(logits, labels, ids(), ref_logps=ref)
    b = make(backend)(logits, labels.int(), ids().int(), ref_logps=ref)
    assert torch.equal(a.loss, b.loss)


def test_numbers_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    logits, labels, ref = inputs()
    sizes = numpy.array(SIZES)
    weights = gk.GroupWeights(group_sizes=sizes, step_size=numpy.float32(0.5), floor=numpy.float64(0.1))
    loss_fn = gk.GroupRobustLoss(weights, beta=numpy.float32(0.25), label_smoothing=numpy.float16(0.25))
    plain = gk.GroupRobustLoss(
        gk.GroupWeights(group_sizes=SIZES, step_size=0.5, floor=0.1), beta=0.25, label_smoothing=0.25
    )
    a, b = (fn(logits, labels, ids(), ref_logps=ref) for fn in (loss_fn, plain))
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(a.alpha, b.alpha)


def test_no_positions_with_shifted_labels(backend: str) -> None:
    logits = torch.zeros(4, 0, 7, requires_grad=True)
    logps = gk.sequence_logps(logits, torch.zeros(4, 0, dtype=torch.int64), shift_labels=True, backend=backend)
    assert logps.tolist() == [0.0] * 4
    assert torch.autograd.grad(logps.sum(), logits)[0].shape == (4, 0, 7)
