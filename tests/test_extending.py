"""docs/extending.md is true: its loss type and its backend work, everywhere that built-in ones do."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_linear_pairs
import test_sequence_logps
import torch
import truth
from conftest import batch

import grpo_kernels as gk
from grpo_kernels.groups.rules import ALPHA_RULES
from grpo_kernels.kernels import dispatch
from grpo_kernels.pair_losses import PAIR_LOSSES

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "docs/extending.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the document's blocks define, in their order; the block that begins with a file's name is that file."""
    folder, names = tmp_path_factory.mktemp("extending"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(dispatch, "BACKENDS", list(dispatch.BACKENDS))
        patch.setitem(PAIR_LOSSES, "exponential", None)
        patch.setitem(ALPHA_RULES, "linear", ALPHA_RULES["power"])  # all of its entries are read
        for block in BLOCKS:
            if file := re.match(r"# (\w+\.py)\n", block):
                (folder / file[1]).write_text(block)
            else:
                exec(block, names)
        yield names


@pytest.mark.usefixtures("extended")
def test_the_loss_type_has_its_derivative(backend: str) -> None:
    """On every backend, those that fuse the built-in losses too."""
    logits, labels = batch()
    group_ids = torch.tensor([0, 1, 0])
    loss_fn = gk.GroupRobustLoss(
        gk.GroupWeights(group_sizes=[3, 2], step_size=0.5),
        loss_type="exponential",
        beta=0.2,
        reference_free=True,
        backend=backend,
    )
    out = loss_fn(logits, labels, group_ids)
    (grad,) = torch.autograd.grad(out.loss, logits)
    logps, slopes = truth.sequence_terms(logits, labels)
    h = logps[:3] - logps[3:]
    torch.testing.assert_close(out.pair_losses, torch.exp(-0.2 * h))
    factors = out.alpha[group_ids] * torch.tensor([5 / 3, 5 / 2], dtype=torch.float64)[group_ids] / 3
    dh = factors * -0.2 * torch.exp(-0.2 * h)
    torch.testing.assert_close(grad, torch.cat([dh, -dh])[:, None, None] * slopes)


@pytest.mark.usefixtures("extended")
def test_the_loss_type_in_a_sweep() -> None:
    inputs, labels, ref = test_linear_pairs.batch(torch.float64)
    grads = []
    for plan in ("sweep", "recompute"):
        weights = test_linear_pairs.group_weights()
        loss_fn = gk.LinearGroupRobustLoss(weights, plan=plan, loss_type="exponential")
        out = loss_fn(*inputs[:2], labels, test_linear_pairs.ids(), ref_logps=ref)
        grads.append(torch.autograd.grad(out.loss, inputs[:2]))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", test_sequence_logps.DTYPES)
def test_the_backend_passes_the_backends_tests(extended: dict[str, Any], dtype: torch.dtype) -> None:
    name = "row_by_row"
    assert extended["loss_fn"].backend == name
    test_sequence_logps.test_value_and_gradient(name, dtype, average=True)
    test_sequence_logps.test_packed_equals_truth(name, dtype)


@pytest.mark.usefixtures("extended")
def test_the_backend_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gk.backends()["row_by_row"] == []
    for test in (
        test_sequence_logps.test_all_positions_ignored,
        test_sequence_logps.test_nothing_is_read_where_ignored,
        test_sequence_logps.test_two_runs_are_bitwise_equal,
    ):
        test("row_by_row")
    test_sequence_logps.test_label_outside_the_vocabulary("row_by_row", 13, monkeypatch)
    test_linear_pairs.sweep_is_exact("row_by_row", torch.float64, test_linear_pairs.group_weights)
    request = dispatch.Request("logits", (), torch.float32, torch.device("cpu"))
    assert dispatch.select("auto", request).name != "row_by_row"


def test_the_rule_moves_alpha_and_is_saved(extended: dict[str, Any]) -> None:
    by_rule, other = extended["by_rule"], gk.GroupWeights(group_sizes=[30, 10], rule="linear", slope=1.0, loss_ema=0.9)
    by_rule.update(torch.tensor([3.0, 2.0]), torch.tensor([3, 1]))  # L = (1, 2)
    torch.testing.assert_close(by_rule.alpha, torch.tensor([3 / 8, 5 / 8], dtype=torch.float64))
    with pytest.warns(RuntimeWarning, match="slope=2, here 1"):
        other.load_state_dict(by_rule.state_dict())
    assert torch.equal(other.alpha, by_rule.alpha)
    with pytest.raises(ValueError, match=r"slope must be finite and in \[0"):
        gk.GroupWeights(2, estimator="group_mean", rule="linear", slope=-1.0)


def test_a_slope_or_a_loss_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PAIR_LOSSES["hinge"]
    one_slope = dataclasses.replace(right, slopes=lambda *args: right.slopes(*args)[0], fused=False)
    of_batch = dataclasses.replace(right, value=lambda *args: right.value(*args).mean(), fused=False)
    ids, logps = torch.tensor([0, 1, 0]), torch.randn(6, requires_grad=True)
    for entry, message in ((one_slope, "two slopes of shape"), (of_batch, r"\(3,\), one for each pair, got \(\)")):
        monkeypatch.setitem(PAIR_LOSSES, "mine", entry)
        loss_fn = gk.GroupRobustLoss(gk.GroupWeights(group_sizes=[3, 2], step_size=0.5), loss_type="mine")
        with pytest.raises(ValueError, match=message):
            loss_fn.from_logps(logps, ids, torch.zeros(6))
    monkeypatch.setitem(PAIR_LOSSES, "mine", right.value)
    with pytest.raises(TypeError, match=r"PAIR_LOSSES\['mine'\] must be a PairLoss, got function"):
        gk.GroupRobustLoss(gk.GroupWeights(group_sizes=[3, 2], step_size=0.5), loss_type="mine")


def test_a_backend_whose_module_lacks_something_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_a_backend.py").write_text("token_logps_forward = None")
    monkeypatch.syspath_prepend(tmp_path)
    half, nowhere = (
        dispatch.BackendEntry(name, "", module=name, auto_devices=()) for name in ("half_a_backend", "no_backend")
    )
    monkeypatch.setattr(dispatch, "BACKENDS", [*dispatch.BACKENDS, half, nowhere])
    assert dispatch.backends()["half_a_backend"] == ["its module 'half_a_backend' lacks token_logps_backward"]
    assert "is not found" in dispatch.backends()["no_backend"][0]
    with pytest.raises(NotImplementedError, match="lacks token_logps_backward"):
        gk.sequence_logps(torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), backend="half_a_backend")
