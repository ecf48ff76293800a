"""The pages of docs/: their blocks run, their tables are the code's, and the site lists them all."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest
import torch

import grpo_kernels as gk
from grpo_kernels.__main__ import main
from grpo_kernels.pair_losses import PAIR_LOSSES

DOCS = Path(__file__).parent.parent / "docs"
SHELL = {  # what a page may tell the reader to type, beside README.md's; each is run by the tests that are named
    "python -m grpo_kernels doctor",  # test_readme.py
    "python -m grpo_kernels reproduce",  # test_reproduce.py
    "torchrun --nproc-per-node 2 examples/ddp.py",  # test_examples.py
    "torchrun --nproc-per-node 2 examples/fsdp2.py",
    "torchrun --nproc-per-node 4 examples/tensor_parallel.py",
}
# Elsewhere: test_extending.py, test_nemo_rl.py.
RUN_HERE, RUN_ELSEWHERE = {"first-loop.md", "choosing.md", "losses.md"}, {"extending.md", "trl.md"}


def blocks(name: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / name).read_text(), re.M | re.S)


def run(name: str) -> dict:
    namespace: dict = {}
    for language, code in blocks(name):
        if language == "python":
            exec(compile(code, name, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: str(path.relative_to(DOCS)))
def test_no_block_is_left_out(path: Path) -> None:
    name = str(path.relative_to(DOCS))
    for language, code in blocks(name):
        assert language in ("python", "sh"), f"a block without a language, or of another: {code[:60]}"
        if language == "sh":
            # test_train_data.py parses the options of training.md's commands
            assert set(code.splitlines()) <= SHELL or name == "training.md"
        else:
            assert name in RUN_HERE | RUN_ELSEWHERE


def test_losses_page_is_the_table_of_the_code(capsys: pytest.CaptureFixture) -> None:
    table = re.search(r"<!-- losses -->\n(.*?)\n<!-- /losses -->", (DOCS / "losses.md").read_text(), re.S)
    assert table is not None
    assert main(["doctor", "--losses"]) == 0
    assert capsys.readouterr().out.strip() == table[1]
    run("losses.md")


def test_readme_names_every_loss() -> None:
    names = re.search(r"<!-- losses -->\n(.*?)\n<!-- /losses -->", (DOCS.parent / "README.md").read_text(), re.S)
    assert names is not None
    assert re.findall(r"`(\w+)`", names[1]) == list(PAIR_LOSSES)


@pytest.mark.parametrize("path", sorted((DOCS / "kernels").glob("*.md")), ids=lambda path: path.stem)
def test_pages_of_kernels_follow_one_template(path: Path) -> None:
    headings = re.findall(r"^## (.*)$", path.read_text(), re.M)
    template = ["Formula", "Shapes", "Numerics", "Traffic", "Where", "Known limitations"]
    assert [heading for heading in headings if heading in template] == template


def test_the_site_has_every_page() -> None:
    """And the API's pages every public name, and nothing that is not there."""
    listed = re.findall(r"^ +- (?:\w+: )?(\S+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(), re.M)
    generated = {"index.md", "contributing.md", "changelog.md"}
    assert sorted(set(listed) - generated) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
    documented = set()
    for path in (DOCS / "api").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", path.read_text(), re.M):
            documented.add(name.split(".")[-1])
            if "trl" not in name:  # TRL takes seconds
                assert pkgutil.resolve_name(name) is not None
    assert set(gk.__all__) - {"IGNORE_INDEX", "__version__"} <= documented


@pytest.mark.usefixtures("my_model")
def test_the_first_loop_trains_evaluates_saves_and_loads(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("first-loop.md")
    shown = eval(capsys.readouterr().out.split("}")[0] + "}")
    assert shown == {"a": pytest.approx(0.6931, abs=0.05), "b": pytest.approx(0.6931, abs=0.05)}
    assert names["sizes"] == [16, 8]
    assert not torch.equal(names["groups"].alpha, torch.full((2,), 0.5, dtype=torch.float64)), "alpha has moved"
    assert torch.equal(names["groups"].log_alpha, torch.load("checkpoint.pt")["groups"]["log_alpha"])
    assert names["groups"].pending_counts.sum() == 0, "the evaluation was not taken in"
    assert not torch.equal(names["model"].lm_head.weight, names["reference"].lm_head.weight)
    counted = (names["cu_seqlens"].diff() - 1).tolist()  # the last token of a sequence predicts nothing
    logps = gk.linear_sequence_logps(
        names["hidden"],
        names["model"].lm_head.weight,
        names["labels"],
        cu_seqlens=names["cu_seqlens"],
        shift_labels=True,
    )
    assert counted == [4, 2, 3, 5]
    torch.testing.assert_close(torch.cat([names["out"].chosen_logps, names["out"].rejected_logps]), logps)


def test_accumulated_shares_of_the_first_loop_are_one_batch() -> None:
    """What the page says of `total_pairs`: the step of micro-batches is that of the whole."""
    logps, ids = torch.linspace(-3, -1, 16, dtype=torch.float64).view(2, 8), torch.tensor([0, 1] * 4)

    def step(parts: int) -> tuple[torch.Tensor, torch.Tensor]:
        groups = gk.GroupWeights(group_sizes=[3, 1], step_size=0.5, update="lagged")
        loss_fn = gk.GroupRobustLoss(groups, reference_free=True)
        leaf = logps.clone().requires_grad_()
        for part, some in zip(leaf.chunk(parts, 1), ids.chunk(parts), strict=True):
            loss_fn.from_logps(part.reshape(-1), some, total_pairs=8).loss.backward()
        groups.step()
        return leaf.grad, groups.alpha

    for whole, accumulated in zip(step(1), step(4), strict=True):
        torch.testing.assert_close(accumulated, whole)


def test_the_step_size_of_the_page() -> None:
    """Its numbers, and what it says that a step size does: n steps with a gap multiply the ratio by exp(n eta gap)."""
    step_size = run("choosing.md")["step_size"]
    assert f"step_size = min(by_gap, by_noise)  # {step_size:.3f}" in (DOCS / "choosing.md").read_text()
    groups = gk.GroupWeights(2, step_size=step_size, estimator="group_mean")
    for _ in range(500):
        groups.update(torch.tensor([0.7, 0.7 + 0.0693]), torch.tensor([1, 1]))
    assert (groups.alpha[1] / groups.alpha[0]).item() == pytest.approx(torch.e, rel=1e-3)


def test_every_field_of_the_output_is_in_the_table() -> None:
    table = (DOCS / "first-loop.md").read_text().split("## What comes back")[1]
    named = [name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)]
    assert tuple(named) == gk.GroupRobustOutput._fields
