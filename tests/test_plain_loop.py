"""What a plain loop gets wrong in silence: modes, total_pairs, checkpoints, and arguments that are nearly right."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import grpo_kernels as gk
from grpo_kernels.groups.watch import Watch

SIZES = [9, 3]


def weights_with(**options) -> gk.GroupWeights:
    return gk.GroupWeights(**{"group_sizes": SIZES, "step_size": 0.1, **options})


def batch(num_pairs: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits with gradient, labels, group_ids); reference-free."""
    logits = torch.randn(2 * num_pairs, 5, 11, requires_grad=True)
    return logits, torch.randint(0, 11, (2 * num_pairs, 5)), torch.arange(num_pairs) % 2


def loss_of(weights: gk.GroupWeights, **options) -> gk.GroupRobustLoss:
    return gk.GroupRobustLoss(weights, reference_free=True, backend="torch", **options)


# -- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [False, True])
def test_the_mode_of_one_loss_is_not_that_of_another_that_shares_the_weights(linear: bool) -> None:
    weights = weights_with()
    if linear:
        training, evaluation = (gk.LinearGroupRobustLoss(weights, reference_free=True) for _ in range(2))
        head = torch.randn(11, 11)
        inputs = (batch()[0], head, *batch()[1:])
    else:
        training, evaluation, inputs = loss_of(weights), loss_of(weights), batch()
    evaluation.eval()
    before = weights.alpha
    evaluation(*inputs)
    assert torch.equal(weights.alpha, before)
    training(*inputs)
    assert not torch.equal(weights.alpha, before)
    before = weights.alpha
    weights.eval()  # their own mode holds them still for all
    training(*inputs)
    assert torch.equal(weights.alpha, before)


def test_a_parent_module_s_mode_is_the_loss_s() -> None:
    loss_fn = loss_of(weights_with())
    parent = torch.nn.ModuleDict({"loss": loss_fn, "model": torch.nn.Dropout()})
    parent.eval()
    assert not loss_fn.training
    assert loss_fn.group_weights.training
    before = loss_fn.group_weights.alpha
    loss_fn(*batch())
    assert torch.equal(loss_fn.group_weights.alpha, before)
    parent.train()
    loss_fn(*batch())
    assert not torch.equal(loss_fn.group_weights.alpha, before)
    with pytest.raises(ValueError, match="mode must be a bool, got str"):
        loss_fn.train("yes")


def test_training_with_a_loss_in_eval_mode_says_so_once() -> None:
    loss_fn = loss_of(weights_with()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn(*batch())  # no backward: an evaluation
        with torch.no_grad():
            loss_fn(*batch())
    with pytest.warns(RuntimeWarning, match=r"do not move alpha.*Call loss_fn.train\(\)"):
        loss_fn(*batch()).loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn(*batch()).loss.backward()
        still = loss_of(weights_with().eval())  # on purpose
        still(*batch()).loss.backward()


# -- sequences without a counted token ---------------------------------------------------------------------------------


EMPTY = "sequences have no counted token.*of their pairs the other answer alone is trained"


def with_empty(*sequences: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits, labels, ids = batch()
    labels[list(sequences)] = -100
    return logits, labels, ids


def forward_of(kind: str, weights: gk.GroupWeights, **options) -> Callable[..., gk.GroupRobustOutput]:
    """(logits, labels, group_ids, **pair options) -> output."""
    if kind == "linear":
        linear = gk.LinearGroupRobustLoss(weights, reference_free=True, **options)
        return lambda hidden, *rest, **given: linear(hidden, torch.ones(11, 11), *rest, **given)
    loss_fn = loss_of(weights, **options)
    if kind == "packed":
        lengths = F.pad(torch.full((8,), 5).cumsum(0), (1, 0))
        return lambda logits, labels, ids, **given: loss_fn(
            logits.flatten(0, 1), labels.flatten(), ids, cu_seqlens=lengths, **given
        )
    if kind == "logps":
        return lambda logits, labels, ids, **given: loss_fn.from_logps(
            gk.sequence_logps(logits, labels), ids, token_counts=(labels != -100).sum(1), **given
        )
    return loss_fn


@pytest.mark.parametrize("update", ["inline", "lagged"])
@pytest.mark.parametrize("kind", ["logits", "linear", "packed", "logps"])
def test_sequences_that_train_nothing_are_counted_and_told_once(kind: str, update: str) -> None:
    weights = weights_with(update=update)
    forward = forward_of(kind, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward(*with_empty())
        assert weights.diagnose().empty_sequences == 0
    with pytest.warns(RuntimeWarning, match=f"3 {EMPTY}"):
        forward(*with_empty(1, 3, 7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward(*with_empty(0))
        weights.state_dict()
        assert weights.diagnose().empty_sequences == 4


def test_sequences_of_nothing_where_nobody_trains_on_them() -> None:
    weights = weights_with()
    loss_fn = loss_of(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        padded = torch.tensor([1.0, 1.0, 1.0, 0.0])  # a batch filled up with a pair that weighs nothing
        loss_fn(*with_empty(3, 7), weights=padded)
        with torch.no_grad():
            loss_fn(*with_empty(1))
        loss_fn.eval()(*with_empty(1))
        loss_fn.train().from_logps(torch.zeros(8), torch.zeros(4, dtype=torch.long))  # nobody knows
    assert weights.diagnose().empty_sequences == 0


@pytest.mark.parametrize(("layout", "pair"), [("chosen_first", (0, 4)), ("interleaved", (0, 1))])
def test_a_pair_that_weighs_nothing_is_found_in_either_layout(layout: str, pair: tuple[int, int]) -> None:
    loss_fn = loss_of(weights_with(), layout=layout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn(*with_empty(*pair), weights=torch.tensor([0.0, 1.0, 1.0, 1.0]))
    with pytest.warns(RuntimeWarning, match=f"2 {EMPTY}"):
        loss_fn(*with_empty(*pair), weights=torch.tensor([1.0, 0.0, 0.0, 0.0]))


def test_a_first_label_that_nothing_predicts_counts_for_none() -> None:
    weights = weights_with()
    logits, labels, ids = batch()
    labels[2, 1:] = -100
    loss_of(weights)(logits, labels, ids)
    with pytest.warns(RuntimeWarning, match=f"1 {EMPTY}"):
        loss_of(weights, shift_labels=True)(logits, labels, ids)


@pytest.mark.parametrize("read", ["step", "state_dict", "diagnose"])
def test_a_gpu_s_count_is_read_where_something_is_read_anyway(read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_with(update="lagged")
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(Watch, "num_empty", lambda self: 0)
        loss_of(weights)(*with_empty(1))
    with pytest.warns(RuntimeWarning, match=f"1 {EMPTY}"):
        getattr(weights, read)()


# -- lagged ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("totals", "message"),
    [
        ([None, None], "2 forwards since the last step.* gave no total_pairs"),
        ([400, 400], "total_pairs=400 in a step of 4 pairs"),
        ([torch.tensor(3), torch.tensor(3)], r"2 forwards of 4 pairs since the last step\(\), more than total_pairs=3"),
        ([], "has not seen a single pair"),
    ],
)
def test_step_warns_once_of_what_cannot_be_right(totals: list, message: str) -> None:
    weights = weights_with(update="lagged")
    loss_fn = loss_of(weights)
    for attempt in range(2):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for total, num_pairs in zip(totals, (3, 1), strict=False):
                loss_fn(*batch(num_pairs), total_pairs=total).loss.backward()
            weights.step()
        assert len(said) == (attempt == 0)
        if said:
            with pytest.warns(RuntimeWarning, match=message):
                warnings.warn(said[0].message, stacklevel=1)


def test_a_loop_that_forgets_step_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_kernels.groups.watch.UNSTEPPED", 3)
    for total, forwards, message in ((8, 3, "3 forwards of 12 pairs"), (None, 3, "3 forwards without step")):
        loss_fn = loss_of(weights_with(update="lagged"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(forwards - 1):
                loss_fn(*batch(), total_pairs=total).loss.backward()
        with pytest.warns(RuntimeWarning, match=message):
            loss_fn(*batch(), total_pairs=total)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss_fn(*batch(), total_pairs=total)


def test_step_is_silent_where_all_is_right() -> None:
    weights = weights_with(update="lagged")
    loss_fn = loss_of(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for total in (None, 4, torch.tensor(4)):
            for num_pairs in (4,) if total is None else (3, 1):
                loss_fn(*batch(num_pairs), total_pairs=total).loss.backward()
            loss_fn.eval()(*batch(2))  # an evaluation in between counts for nothing
            loss_fn.train()
            weights.step()
        weights.step()  # an empty step after others that were not
        meta = weights_with(update="lagged").to("meta")
        meta.step()  # has nothing that could be read
        means = weights_with(update="lagged", estimator="group_mean")  # which takes no total_pairs
        for _ in range(2):
            loss_of(means)(*batch(2)).loss.backward()
        means.step()
    loss_fn(*batch(4), total_pairs=5).loss.backward()
    with pytest.warns(RuntimeWarning, match="total_pairs=5 in a step of 4 pairs"):  # all was right so far
        weights.step()


def test_forwards_in_eval_mode_before_step_are_told() -> None:
    weights = weights_with(update="lagged")
    loss_of(weights).eval()(*batch())
    with pytest.warns(RuntimeWarning, match="Forwards count in training mode with gradients on"):
        weights.step()


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        ({"step_size": 0.3}, {}, "step_size=0.3, here 0.1"),
        ({"update": "lagged"}, {}, "update='lagged', here 'inline'"),
        ({}, {"loss_ema": 0.5}, "loss_ema=0, here 0.5"),
        ({"floor": 0.1, "chi": 0.5}, {}, "floor=0.1, here 0, chi=0.5, here 1"),
        ({"rule": "cvar", "level": 0.5, "step_size": None}, {}, "rule='cvar', here 'exponentiated_gradient'. It"),
        ({"estimator": "group_mean", "prior": "sizes"}, {}, "estimator='group_mean', here 'importance', prior='sizes'"),
    ],
)
def test_a_checkpoint_made_with_other_options_says_which(saved: dict, loaded: dict, message: str) -> None:
    first, second = weights_with(**saved), weights_with(**loaded)
    first.update(torch.tensor([3.0, 1.0]), torch.tensor([2, 1]))
    with pytest.warns(RuntimeWarning, match=f"moved with other options: .*{message}"):
        second.load_state_dict(first.state_dict())
    assert torch.equal(second.alpha, first.alpha)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights_with(**loaded).load_state_dict(second.state_dict())  # whose options are its own, not the first's
        rounded = {name: x.bfloat16() if x.is_floating_point() else x for name, x in second.state_dict().items()}
        weights_with(**loaded).load_state_dict(rounded)


@pytest.mark.parametrize(
    ("options", "said", "left_out"),
    [
        ({"loss_ema": 0.5}, "loss_ema=0.5, here 0", "ema_losses, ema_weights"),
        ({"step_size": "auto"}, "step_size=auto, here 0.1", "hedge_gains, hedge_gap_sum"),
        ({"baseline": [0.1, 0.2]}, "baseline=given, here none", "baseline"),
        ({"baseline": "running"}, "baseline=running, here none", "baseline, baseline_sums, baseline_weights"),
        ({"inner_tilt": 0.5, "update": "lagged"}, "inner_tilt=0.5, here 0", "tilted_means, pending_log_tilts"),
    ],
)
def test_what_an_option_has_gathered_is_left_out_where_it_is_off(
    options: dict[str, Any], said: str, left_out: str
) -> None:
    """And begins anew where it is on: in both directions one warning says which options alpha goes on with."""
    plain, with_option = weights_with(), weights_with(**options)
    for weights in (plain, with_option):
        weights.update(torch.tensor([3.0, 1.0]), torch.tensor([2, 1]))
    state = with_option.state_dict()
    with pytest.warns(RuntimeWarning, match=said) as seen:
        plain.load_state_dict(state)
    assert len(seen) == 1
    assert str(seen[0].message).endswith(f"left out of the checkpoint, as no option here uses them: {left_out}")
    assert torch.equal(plain.alpha, with_option.alpha)
    assert not set(left_out.split(", ")) - set(state), "the user's dict stays whole"
    with pytest.warns(RuntimeWarning, match="moved with other options") as seen:
        with_option.load_state_dict(plain.state_dict())
    assert len(seen) == 1
    begun = weights_with(**options).state_dict()
    for name in left_out.split(", "):
        torch.testing.assert_close(with_option.state_dict()[name], begun[name], rtol=0, atol=0, equal_nan=True)


def test_group_sizes_are_an_option_that_not_every_estimator_needs() -> None:
    sized, unsized = weights_with(), gk.GroupWeights(2, step_size=0.1, estimator="group_mean")
    for first, second in ((sized, unsized), (unsized, sized)):
        first.update(torch.tensor([3.0, 1.0]), torch.tensor([2, 1]))
        sizes = second.group_sizes
        with pytest.warns(RuntimeWarning, match="estimator=") as seen:
            second.load_state_dict(first.state_dict())
        assert len(seen) == 1
        assert torch.equal(second.alpha, first.alpha)
        assert second.group_sizes is sizes


def test_a_checkpoint_without_alpha_says_so() -> None:
    model = torch.nn.ModuleDict({"model": torch.nn.Linear(2, 2), "loss": loss_of(weights_with())})
    state = {name: value for name, value in model.state_dict().items() if name.startswith("model")}
    with pytest.warns(RuntimeWarning, match=r"holds no alpha \(loss.group_weights.log_alpha\)"):
        model.load_state_dict(state, strict=False)
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


def test_a_checkpoint_of_before_options_were_saved_still_loads() -> None:
    first = weights_with()
    first.update(torch.tensor([3.0, 1.0]), torch.tensor([2, 1]))
    state = {name: x for name, x in first.state_dict().items() if name not in ("settings", "shared_updates")}
    second = weights_with()
    second.load_state_dict(state)
    assert torch.equal(second.alpha, first.alpha)


# -- arguments that are nearly right ---------------------------------------------------------------------------------


def test_a_bad_group_id_s_warning_names_what_can_be_wrong_and_the_switch() -> None:
    logits, labels, ids = batch()
    with pytest.warns(RuntimeWarning, match=r"group id outside .*label outside .*NaN.*GRPO_KERNELS_DEBUG=1"):
        loss_of(weights_with())(logits, labels, ids + 1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"us": 9, "fr": 3}, r"got a dict. Number its keys.*list\(group_sizes.values\(\)\)"),
        ({9, 3}, "group_sizes must be a list or tensor of whole numbers, got"),
        (["nine", 3], "group_sizes must be a list or tensor of whole numbers, got"),
        ([9, None], "group_sizes must be a list or tensor of whole numbers, got"),
    ],
)
def test_group_sizes_that_are_no_list_of_numbers(sizes: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        weights_with(group_sizes=sizes)


@pytest.mark.parametrize("linear", [False, True])
def test_lists_and_lengths_for_cu_seqlens(linear: bool) -> None:
    logits, labels, ids = batch()
    rows, labels = logits.flatten(0, 1), labels.flatten()
    if linear:
        of_linear = gk.LinearGroupRobustLoss(weights_with(), reference_free=True)

        def call(cu_seqlens: object) -> torch.Tensor:
            return of_linear(rows, torch.randn(11, 11), labels, ids, cu_seqlens=cu_seqlens).loss
    else:

        def call(cu_seqlens: object) -> torch.Tensor:
            return loss_of(weights_with())(rows, labels, ids, cu_seqlens=cu_seqlens).loss

    lengths = torch.full((8,), 5)
    with pytest.raises(TypeError, match=r"cu_seqlens must be a torch.Tensor, got list; torch.as_tensor\(cu_seqlens\)"):
        call([0, 5, 10, 15, 20, 25, 30, 35, 40])
    with pytest.raises(ValueError, match=r"cu_seqlens must have shape \(2B \+ 1,\).*got \(8,\).*lengths.cumsum\(0\)"):
        call(lengths)
    call(torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))  # what the message says
    nine = torch.tensor([5, 5, 5, 5, 5, 5, 5, 4, 1])  # as many numbers as ends
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to 40.*lengths.cumsum\(0\)"):
        gk.sequence_logps(rows, labels, cu_seqlens=nine)
    with pytest.raises(TypeError, match=r"cu_seqlens must be a torch.Tensor, got tuple"):
        gk.sequence_logps(rows, labels, cu_seqlens=(0, 40))


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("dpo", "sigmoid"),
        ("DPO", "sigmoid"),
        ("IPO", "ipo"),
        ("rdpo", "robust"),
        ("slic", "hinge"),
        ("GR-DPO", "sigmoid"),
    ],
)
def test_what_others_call_a_loss_is_named(name: str, ours: str) -> None:
    for call in (
        lambda: loss_of(weights_with(), loss_type=name),
        lambda: gk.preference_losses(torch.zeros(2), loss_type=name),
    ):
        with pytest.raises(
            ValueError,
            match=rf"loss_type must be ('{ours}' for what is also called '{name}'|.*got '{name}': .* called '{ours}')",
        ):
            call()
    with pytest.raises(ValueError, match=r"loss_type must be one of 'sigmoid', .*got 'dpoo'"):
        loss_of(weights_with(), loss_type="dpoo")


def test_what_is_nearly_a_tensor_is_told_how_to_become_one() -> None:
    logits, labels, group_ids = batch()
    loss_fn = loss_of(weights_with())
    of_hidden = gk.LinearGroupRobustLoss(weights_with(), reference_free=True)
    head = torch.nn.Linear(11, 11)
    for call, message in (
        (lambda: loss_fn(logits, labels, ["a", "b", "a", "b"]), "got list of names: number them"),
        (lambda: loss_fn(logits, labels, group_ids.numpy()), r"got ndarray; torch.as_tensor\(group_ids\) makes one"),
        (lambda: loss_fn(logits, labels.tolist(), group_ids), r"got list; torch.as_tensor\(labels\) makes one"),
        (lambda: loss_fn(SimpleNamespace(logits=logits), labels, group_ids), r"SimpleNamespace: pass its .logits"),
        (lambda: of_hidden(logits, head, labels, group_ids), "got Linear: pass its .weight"),
        (lambda: of_hidden((logits,), head.weight, labels, group_ids), "hidden must be a torch.Tensor, got tuple$"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
