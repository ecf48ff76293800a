"""Data sets of GroupRobustDPOTrainer: groups of every kind, columns that clash, sets that are no sets, caches."""

from __future__ import annotations

import functools
import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
pytest.importorskip("trl", reason="trl is not installed: pip install 'grpo-kernels[trl]'")
datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'grpo-kernels[trl]'")

import trl  # noqa: E402
from trl_cases import first_batch, model_of, pairs, rows, trainer  # noqa: E402

NAN = float("nan")


def of_features(groups: list[Any], feature: Any) -> Any:
    data = pairs(["a"] * len(groups)).remove_columns("group")
    return data.add_column("group", groups, feature=feature)


LABELS = datasets.ClassLabel(names=["usual", "rare"])


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (pairs([True, False]), ["False", "True"]),
        (pairs([3, 10]), ["10", "3"]),
        (pairs([0.5, 2.0]), ["0.5", "2.0"]),
        (of_features([1, 0], LABELS), ["rare", "usual"]),
        (of_features([1, 0], LABELS).with_format("torch"), ["rare", "usual"]),
        (pairs([3, 10]).with_format("numpy"), ["10", "3"]),
        (pairs(["x", "y"]).with_transform(lambda batch: batch), ["x", "y"]),
    ],
    ids=["bool", "int", "float", "label", "label in tensors", "int in arrays", "transform"],
)
def test_groups_of_every_kind(data: Any, names: list[str]) -> None:
    of = trainer(data=data, eval_data=data)
    assert of.group_names == names
    assert [of.evaluate()[f"eval_groups/{name}/count"] for name in names] == [1, 1]


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (pairs(["a", None]), "row 1 of column 'group' must be a group, got None"),
        (pairs([0.5, NAN]), "row 1 of column 'group' must be a group, got nan"),
        (pairs(["a", "b", " "]), "row 2 of column 'group' must be a group, got ' '"),
        (of_features([1, -1], LABELS), "row 1 of column 'group' must be a group, got -1"),
        (pairs([["a"], ["a", "b"]]), r"row 0 of column 'group' must be one name or number, got a list: \['a'\]"),
        (pairs([{"id": 1}]), r"must be one name or number, got a dict: \{'id': 1\}"),
    ],
    ids=["null", "NaN", "blank", "label", "list", "dict"],
)
def test_a_pair_without_a_group_is_refused(data: Any, where: str) -> None:
    with pytest.raises(ValueError, match=where):
        trainer(data=data)
    with pytest.raises(ValueError, match=where):
        trainer().evaluate(data)
    with pytest.raises(ValueError, match=r"a pair's 'group' must be (a group|one name)"):
        list(trainer(data=data.to_iterable_dataset(), group_sizes={"a": 2, "b": 1, "0.5": 1, "rare": 1}).train_dataset)


def test_names_that_differ_in_spaces_or_case_are_named() -> None:
    with pytest.warns(UserWarning, match=r"groups apart: \[\['DE', 'de '\], \['New  York', 'new york'\]\]"):
        trainer(data=pairs(["de ", "DE", "fr", "New  York", "new york"]))
    with pytest.warns(UserWarning, match="groups apart"):
        trainer(data=pairs(["\u00e9", "e\u0301\u200b"]))  # an e with its accent, and one with a sign of no width
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer(data=pairs(["a b", "ab"]))


@pytest.mark.parametrize("column", ["group_id", "group_ids", "group (name)", "completion_mask"])
def test_a_column_of_any_name(column: str) -> None:
    """And a set that the trainer has prepared means the same as the raw one. "10" sorts before "2"."""
    data = pairs([1, 2, 10, 2], column)
    streamed = column == "group_ids"
    of = trainer(data=data, eval_data=data.to_iterable_dataset() if streamed else data, group_column=column)
    wanted = of.evaluate()
    for again in (data, data.to_iterable_dataset(), of.eval_dataset):
        got = of.evaluate(again)
        for name in ("1", "2", "10"):
            assert got[f"eval_groups/{name}/loss"] == pytest.approx(wanted[f"eval_groups/{name}/loss"], rel=1e-6), name


def test_columns_of_the_reference_come_together() -> None:
    one = pairs(["a", "b"] * 4).add_column("ref_chosen_logps", [-2.5] * 8)
    for given in (one, one.to_iterable_dataset()):
        with pytest.raises(ValueError, match=r"eval_dataset must have the columns .* got ref_chosen_logps alone"):
            trainer(eval_data=given)
    both = one.add_column("ref_rejected_logps", [-1.5] * 8)
    batch = first_batch(trainer(data=both))
    assert torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]]).tolist() == [-2.5] * 3 + [-1.5] * 3


def test_a_set_prepared_by_a_trainer_of_other_groups() -> None:
    """Ids of one are not ids of the other: names travel."""
    prepared = trainer(eval_data=pairs(["b", "b", "a"])).eval_dataset
    of = trainer(data=pairs(["0", "a", "b"] * 2))
    got = of.evaluate(prepared)
    assert [got[f"eval_groups/{name}/count"] for name in "0ab"] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"lacks: '0' \(1 pairs\); known are \['a', 'b'\]"):
        trainer().evaluate(trainer(data=pairs(["0", "a"]), eval_data=pairs(["0"])).eval_dataset)


def test_streamed_class_labels_and_dicts_of_sets() -> None:
    data = of_features([1, 0, 0], LABELS)
    sets = datasets.IterableDatasetDict({"one": data.to_iterable_dataset(), "two": data.to_iterable_dataset()})
    of = trainer(data=data, eval_data=sets)
    first, again, apart = (
        of.evaluate(),
        of.evaluate(of.eval_dataset),
        of.evaluate({"one": data, "two": data.select([1])}),
    )
    for got in (first, again, apart):
        assert [got[f"eval_one_groups/{name}/count"] for name in ("usual", "rare")] == [2, 1]
    assert apart["eval_two_groups/rare/count"] == 0
    assert apart["eval_two_loss"] == apart["eval_two_groups/usual/loss"]
    with pytest.raises(ValueError, match=r"eval_dataset\['two'\] must have a column 'group'"):
        of.evaluate({"one": data, "two": data.remove_columns("group")})


def test_an_evaluation_counts_its_own_set() -> None:
    of = trainer(eval_data=pairs(["a", "b", "b"]))
    first = of.evaluate()
    predicted = of.predict(of.eval_dataset)
    batch = of._prepare_inputs(of.data_collator([of.eval_dataset[0]]))
    of.compute_loss(of.model, batch)  # someone looks at a batch in between
    assert of.evaluate(pairs(["b"]))["eval_groups/a/count"] == 0
    again = of.evaluate()
    for name in ("eval_groups/a/count", "eval_groups/b/count", "eval_groups/b/loss"):
        assert first[name] == again[name] == predicted.metrics[name.replace("eval_", "test_")]
    with pytest.raises(ValueError, match=r"a pair must come with its group in the column 'group \(name\)'"):
        of.data_collator([trainer(data=pairs(["c"])).train_dataset[0]])


@pytest.mark.parametrize("kind", ["list", "frame", "empty", "emptied", "dict"])
def test_what_is_no_set_of_pairs(kind: str) -> None:
    data: Any = {
        "list": rows(["a"]),
        "frame": pairs(["a"]).to_pandas(),
        "empty": pairs(["a"]).select([]),
        "emptied": pairs(["a"]).map(lambda pair: {"prompt": "so long a prompt that nothing is left of the answers"}),
        "dict": {"train": pairs(["a"])},
    }[kind]
    error: Any = ValueError if "empt" in kind else TypeError
    message = {
        "empty": "must have at least one pair",
        "emptied": "max_length=20 leaves no pair of the (train|eval) data",
    }
    wanted = message.get(kind, "must be a Dataset or an IterableDataset, got")
    with pytest.raises(error, match=wanted):
        trainer(data=data, max_length=20)
    if kind != "dict":
        with pytest.raises(error, match=wanted):
            trainer(max_length=20).evaluate(data)


def test_pairs_that_teach_nothing_are_counted_and_named() -> None:
    """Left out by max_length, as by TRL; alike within it; or with a first token that nothing predicts."""
    long, same = "so long a prompt that nothing is left of the answers", "the same words to the end, then "
    texts = [
        ("p", "yes", "no"),
        (long, "yes", "no"),
        ("p", f"{same}yes", f"{same}no"),
        ("", "yes", "no"),
        ("p", "a", "b"),
    ]
    names = dict(zip(("prompt", "chosen", "rejected"), zip(*texts, strict=True), strict=True))
    data = datasets.Dataset.from_dict({**names, "group": ["a", "b", "a", "b", "b"]})
    with pytest.warns(UserWarning, match="train data: ") as seen:
        of = trainer(data=data, max_length=20)
    said = [str(warning.message) for warning in seen if str(warning.message).startswith("train data")]
    assert said == [
        "train data: 1 of 5 pairs have a prompt that fills max_length=20: they are left out ('b' 1); the first is row 1"
        ", whose chosen answer is 'yes</s>'",
        "train data: 1 of 5 pairs have the same tokens chosen and rejected within max_length=20: they move nothing "
        f"('a' 1); the first is row 2, whose chosen answer is '{same}yes</s>'",
        "train data: 1 of 5 pairs begin with their answer's tokens: nothing predicts the first one, which is not "
        "trained ('b' 1); the first is row 3, whose chosen answer is 'yes</s>'",
    ]
    args = trl.DPOConfig(of.args.output_dir, max_length=20, report_to="none", bf16=False, use_cpu=True)
    tokenizer = of.processing_class
    models = {"model": model_of("Llama"), "ref_model": model_of("Llama", 1)}
    theirs = trl.DPOTrainer(**models, args=args, train_dataset=data, processing_class=tokenizer)
    assert of.train_dataset["chosen_ids"] == theirs.train_dataset["chosen_ids"]
    assert of.group_weights.group_sizes.tolist() == [2, 2]
    with pytest.warns(UserWarning, match=r"1 of 5 pairs begin with their answer's tokens") as seen:
        of = trainer(data=data, max_length=20, truncation_mode="keep_end")
    assert len(of.train_dataset) == 5
    assert not any("left out" in str(warning.message) or "same tokens" in str(warning.message) for warning in seen)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer(data=data.select([0, 4]), max_length=20)
        trainer(data=data.select([0, 1, 2, 4]), max_length=None)


def test_a_transform_reads_and_makes_columns_of_whole_rows() -> None:
    """Once: it may be one that is not to be repeated, and that knows no columns but its own."""

    def louder(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        chosen = [f"{text}!" for text in batch["chosen"]]
        return {"prompt": batch["prompt"], "chosen": chosen, "rejected": batch["rejected"], "group": batch["by"]}

    data = pairs(["a", "b", "b"], "by")
    wanted = trainer(data=data.map(louder, batched=True), eval_data=data.map(louder, batched=True)).evaluate()
    of = trainer(data=data.with_transform(louder), eval_data=data.with_transform(louder))
    for got in (of.evaluate(), of.evaluate(data.with_transform(louder))):
        for name in ("eval_loss", "eval_groups/a/loss", "eval_groups/b/count"):
            assert got[name] == wanted[name]


def test_sets_and_sizes_by_names_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"eval_dataset must be a set, or one of the names \['one'\], got 'two'"):
        trainer(eval_data={"one": pairs(["a"])}).evaluate("two")
    with pytest.raises(ValueError, match=r"one of the names \[\], got 'pairs.jsonl'"):
        trainer(eval_data=pairs(["a"])).evaluate("pairs.jsonl")
    for sizes, message in (
        ({1: 1, 2: 2}, r"group_sizes must have names, which are strings \(of numbers, too\), got 1"),
        ({"a": "2"}, r"group_sizes\['a'\] must be a whole number, got '2'"),
        ({"a": True}, r"group_sizes\['a'\] must be a whole number, got True"),
        ({"a": 0}, r"group_sizes\['a'\] must be finite and in \[1, inf\), got 0"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            trainer(group_sizes=sizes)
    for option in ("group_column", "margin_column"):
        with pytest.raises(ValueError, match=r"must be none that TRL reads, got \['tools'\]"):
            trainer(**{option: "tools"})
    with pytest.raises(TypeError, match="group_column must be a column's name, got 5"):
        trainer(group_column=5)
    with pytest.raises(ValueError, match=r"no pair to evaluate: .* dataloader_drop_last=True may leave none"):
        trainer(eval_data=pairs(["a"]), dataloader_drop_last=True).evaluate()


def test_tensors_for_columns_change_nothing() -> None:
    """TRL's collator would add tensors of token ids where it means to join lists."""
    data = pairs(["a", "b", "b"])
    plain, tensors = (trainer(data=x, eval_data=x) for x in (data, data.with_format("torch")))
    assert tensors.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert tensors.evaluate(data.with_format("torch"))["eval_loss"] == plain.evaluate()["eval_loss"]
    streamed = data.to_iterable_dataset().with_format("torch")
    assert plain.evaluate(streamed)["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)


def test_nothing_pickles_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    dumps = datasets.fingerprint.dumps
    monkeypatch.setattr(datasets.fingerprint, "dumps", lambda thing: (sizes.append(len(dumps(thing))), dumps(thing))[1])
    of = trainer(eval_data=pairs(["a"]))
    of.evaluate(pairs(["a", "b"]))
    of.evaluate(pairs(["a", "b"]).to_iterable_dataset())
    weights = sum(p.numel() * p.element_size() for p in of.model.parameters())
    assert 0 < max(sizes) < weights / 2, "the tokenizer is pickled, and no model"


def test_the_second_run_finds_everything_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs(["a", "b"] * 4).save_to_disk(tmp_path / "data")
    computed = []
    map_single = datasets.Dataset._map_single

    @functools.wraps(map_single)
    def counted(*args: Any, **kwargs: Any) -> Any:
        computed.append(kwargs["function"])
        return map_single(*args, **kwargs)

    monkeypatch.setattr(datasets.Dataset, "_map_single", staticmethod(counted))
    fingerprints = []
    for model in (None, model_of("Qwen2")):
        data = datasets.load_from_disk(tmp_path / "data")
        of = trainer(model=model, data=data, eval_data=data, output_dir=str(tmp_path / "out"))
        fingerprints.append((of.train_dataset._fingerprint, len(computed)))
    assert fingerprints[0] == fingerprints[1]
    assert computed, "the first run computes"


@pytest.mark.parametrize("streamed", [False, True])
def test_numbers_of_each_pair(streamed: bool) -> None:
    """Each pair in a group of its own: its loss is that of a trainer whose options are its numbers."""
    beta, margin, weight, soft = [0.1, 0.5, 2.0], [0.0, 0.3, -1.0], [1.0, 0.25, 3.0], [0.0, 0.9, 0.3]
    data = pairs(list("xyz")).add_column("b", beta).add_column("m", margin).add_column("w", weight)
    data = data.add_column("e", soft)
    columns = {"beta_column": "b", "margin_column": "m", "weight_column": "w", "label_smoothing_column": "e"}
    given = data.to_iterable_dataset() if streamed else data
    got = trainer(data=given, eval_data=given, group_sizes=dict.fromkeys("xyz", 1), **columns).evaluate()
    for i, name in enumerate("xyz"):
        alone = trainer(data=data, eval_data=data.select([i]), beta=beta[i]).evaluate()
        loss, reward = alone[f"eval_groups/{name}/loss"], alone["eval_rewards/margins"]
        assert loss == pytest.approx(math.log1p(math.exp(-reward)), rel=1e-5)
        z = reward - beta[i] * margin[i]
        expected = (1 - soft[i]) * math.log1p(math.exp(-z)) + soft[i] * math.log1p(math.exp(z))
        expected *= weight[i]
        assert got[f"eval_groups/{name}/loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, -1.0], "row 1 of column 'w' must be a number, at least 0, got -1.0"),
        ([1.0, None], "row 1 of column 'w' must be a number, at least 0, got None"),
        ([NAN, 1.0], "row 0 of column 'w' must be a number, at least 0, got nan"),
        (["1", "2"], "row 0 of column 'w' must be a number, at least 0, got '1'"),
    ],
)
def test_numbers_that_are_none(values: list[Any], message: str) -> None:
    data = pairs(["a", "b"]).add_column("w", values)
    with pytest.raises(ValueError, match=message):
        trainer(data=data, weight_column="w")


def test_soft_labels_that_are_none() -> None:
    data = pairs(["a", "b"]).add_column("e", [0.5, 1.5])
    with pytest.raises(ValueError, match=r"row 1 of column 'e' must be a number, in \[0, 1\], got 1.5"):
        trainer(data=data, label_smoothing_column="e")
    for column, loss_type in (("label_smoothing_column", "hinge"), ("margin_column", "bco_pair")):
        with pytest.raises(ValueError, match=rf"{column} has no meaning for loss_type=\['{loss_type}'\], got 'e'"):
            trainer(data=data, loss_type=loss_type, **{column: "e"})


def test_numbers_that_are_none_in_a_stream() -> None:
    data = pairs(["a", "b"]).add_column("b", [1.0, 0.0]).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"a pair's 'b' must be a number, above 0, got 0.0"):
        trainer(data=data, group_sizes={"a": 1, "b": 1}, beta_column="b").train()
    with pytest.raises(
        ValueError, match=r"must have a column 'weight', it has .*; is it 'weights'\? Pass weight_column"
    ):
        trainer(data=pairs(["a"]).add_column("weights", [1.0]), weight_column="weight")
