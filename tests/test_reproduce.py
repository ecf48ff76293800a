"""The paper's claims on the bandit with the paper's own settings and 20 seeds, and what `reproduce` leaves."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from once import once

import grpo_kernels as gk
from grpo_kernels.__main__ import main
from grpo_kernels.paper import claims, robustness
from grpo_kernels.paper import command as reproduce
from grpo_kernels.paper.bandit import FEATURES, REWARD_THETA, SCENARIOS
from grpo_kernels.paper.batched import METHODS, Method, PairBatch, one_thread
from grpo_kernels.paper.report import wins

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "reproduction.md").read_text()
SEEDS = 20


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def swapped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = once(tmp_path_factory, "swapped", lambda folder: (folder / "r.json").write_text(json.dumps(comparison())))
    return json.loads((made / "r.json").read_text())


def comparison() -> dict[str, Any]:
    """Of the paper's main features, as the command runs it."""
    results: dict[str, Any] = {"comparison": [], "chi": [], "config": {"seeds": SEEDS}}
    cells = [(scenario, "swapped") for scenario in SCENARIOS]
    with one_thread():
        draws = reproduce.Draws.of(cells, SEEDS)
        for family in reproduce.FAMILIES:
            iterations = 100 if family.loss_type == "ipo" else 10_000
            runs = reproduce.run_family(family, draws, METHODS, iterations)
            results["comparison"] += reproduce.comparison_records(family, draws, runs, SEEDS)
    return results


@pytest.mark.parametrize("family", ["DPO", "IPO"])
def test_group_robust_has_the_smallest_worst_group_loss_in_all_scenarios(swapped, family: str) -> None:
    assert claims.smallest_worst_loss(swapped, family, "swapped").holds
    assert claims.lead_is_larger(swapped, family).holds
    assert claims.never_worse_on_training_pairs(swapped, family).holds
    for scenario in ("ii", "iii"):
        assert wins(swapped, scenario, "swapped", family, "worst_loss") >= 15
        assert wins(swapped, scenario, "swapped", family, "reward_error") == SEEDS


@pytest.mark.parametrize("family", ["DPO", "IPO"])
def test_alpha_of_the_hard_group(swapped, family: str) -> None:
    assert claims.alpha_of_the_hard_group(swapped, family).holds


def test_the_document_prints_these_numbers(swapped) -> None:
    """The rows of docs/reproduction.md, within one of the last digit."""
    rows = re.findall(r"^\| (DPO|IPO) \| swapped \| \((i+)\) \|(.*)\|$", DOCUMENT, re.M)
    assert len(rows) == 6
    for family, scenario, rest in rows:
        printed = [[float(x) for x in re.findall(r"[\d.]+", column)] for column in rest.split("|")]
        for method, (mean, spread) in zip((family, f"IS-{family}", f"GR-{family}"), printed, strict=False):
            loss = claims.cell(swapped, scenario, "swapped", method)["worst_loss"]
            digit = 0.001 if family == "DPO" else 0.01
            assert (mean, spread) == pytest.approx((loss["mean"], loss["sd"]), abs=1.5 * digit)
        assert printed[3] == [wins(swapped, scenario, "swapped", family, "worst_loss")]
        alpha = claims.cell(swapped, scenario, "swapped", f"GR-{family}")["alpha_of_group_0"]["mean"]
        assert printed[4] == pytest.approx([alpha], abs=0.0015)


def sweep(
    family: reproduce.Family, seeds: int, iterations: int, monkeypatch, chis: tuple[float, ...]
) -> dict[str, Any]:
    monkeypatch.setattr(reproduce, "CHIS", chis)
    draws = reproduce.Draws.of([reproduce.CHI_SCENARIO], seeds)
    runs = reproduce.run_family(family, draws, tuple(Method("", chi) for chi in chis), iterations)
    return {"chi": reproduce.chi_records(family, draws, runs)}


def test_chi_trades_the_worst_group_for_the_average(swapped, monkeypatch: pytest.MonkeyPatch) -> None:
    dpo, ipo = reproduce.FAMILIES
    results = {**swapped, **sweep(ipo, SEEDS, 100, monkeypatch, reproduce.CHIS)}
    assert claims.chi_on_training_pairs(results, "IPO").holds, "each seed"
    assert claims.chi_zero_is_importance_sampling(results, "IPO").holds
    results = {**swapped, **sweep(dpo, SEEDS, 10_000, monkeypatch, (0.0, 0.4, 1.0))}
    assert claims.chi_on_validation_pairs(results, "DPO").holds, "the mean of the seeds"
    assert claims.chi_zero_is_importance_sampling(results, "DPO").holds


def test_claims_notice_what_does_not_hold(swapped) -> None:
    """The checks themselves: each says no when the numbers are turned round."""
    turned = json.loads(json.dumps(swapped))
    for record in turned["comparison"]:
        if record["method"].startswith("GR"):
            for measure in ("worst_loss", "training_worst_loss"):
                record[measure]["mean"] += 5
                record[measure]["per_seed"] = [value + 5 for value in record[measure]["per_seed"]]
            record["alpha_of_group_0"]["per_seed"][3] = 0.4
    assert not claims.smallest_worst_loss(turned, "DPO", "swapped").holds
    assert not claims.never_worse_on_training_pairs(turned, "IPO").holds
    assert claims.never_worse_on_training_pairs(turned, "DPO").detail == f"{3 * SEEDS} exceptions"
    assert not claims.alpha_of_the_hard_group(turned, "DPO").holds
    falls, rises = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 3.0])
    for worst, average, holds in (
        (falls, rises, True),
        (rises, falls, False),
        (falls, falls.flip(0)[[0, 2, 1]], False),
    ):
        chi = [
            {"family": "DPO", "validation_worst": reproduce.summary(w), "validation_average": reproduce.summary(a)}
            for w, a in zip(worst.unsqueeze(1), average.unsqueeze(1), strict=True)
        ]
        assert claims.chi_on_validation_pairs({"chi": chi}, "DPO").holds is holds
    curve = {"problem": "", "scale": 1.0, "slope": -0.5, "gaps": [[0.1, 0.3]], "bounds": [0.2]}
    assert not claims.gap_slopes({"convergence": [curve]})[0].holds, "one gap is above the bound"
    assert claims.gap_slopes({"convergence": [{**curve, "bounds": [0.4]}]})[0].holds
    assert not claims.gap_slopes({"convergence": [{**curve, "bounds": [0.4], "slope": -0.2}]})[0].holds


def test_losses_at_theta_zero() -> None:
    assert claims.losses_at_zero().holds
    draws = reproduce.Draws.of([("i", "swapped")], 1)
    zero = torch.zeros(1, 1, 4, dtype=torch.float64)
    torch.testing.assert_close(
        draws.train.group_losses(zero, "sigmoid", 1.0)[0, 0], torch.tensor(2.0).double().log().expand(2)
    )
    torch.testing.assert_close(draws.train.group_losses(zero, "ipo", 0.1)[0, 0], torch.tensor(25.0).double().expand(2))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--seeds", "2", "--iterations", "30", "--ipo-iterations", "20", "--max-horizon", "512"]
    assert main(["reproduce", *options, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    for text in ("GR-DPO", "IS-IPO", "swapped", "flipped", "wins", "holds", "does not hold", "slope"):
        assert text in shown
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.json", "curves.png", "methods.png", "chi.png", "gap.png", "options.json", "options.md",
    }  # fmt: skip
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    cells = {(r["scenario"], r["features"], r["method"]) for r in results["comparison"]}
    assert len(cells) == len(results["comparison"]) == len(SCENARIOS) * len(FEATURES) * 6
    for record in results["comparison"]:
        for measure in ("worst_loss", "reward_error"):
            values = torch.tensor(record[measure]["per_seed"], dtype=torch.float64)
            assert values.shape == (2,)
            assert record[measure]["mean"] == pytest.approx(values.mean().item())
            assert record[measure]["sd"] == pytest.approx(values.std().item())
    assert len(results["chi"]) == 2 * len(reproduce.CHIS)
    assert main(["reproduce", "--seeds", "0"]) == 2
    assert "seeds must be finite and in" in capsys.readouterr().err


def test_the_page_on_options_is_the_record(tmp_path: Path) -> None:
    """docs/choosing.md's tables are made of docs/options.json, and that is what the code computes."""
    record = json.loads((ROOT / "docs" / "options.json").read_text())
    block = re.search(r"<!-- options -->\n(.*)\n<!-- /options -->", (ROOT / "docs" / "choosing.md").read_text(), re.S)
    assert block is not None
    assert block[1] == robustness.document(record)
    assert {len(r["worst"]) for r in record} == {SEEDS}
    some = [option for option in robustness.OPTIONS if option.name in ("IS", "excess")]
    for again in robustness.records(1, 10_000, ["noisy"], some):
        for measure in ("worst", "group_1", "reward_error"):
            recorded = robustness.of(record, "noisy", again["option"], measure)[0]
            assert again[measure][0] == pytest.approx(recorded, abs=0.001), (again["option"], measure)


def test_tilted_means_of_many_runs_are_the_package_s() -> None:
    """And the weights of their pairs: dT_g / dl_i, for each group by itself."""
    losses = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 1, 0, 1])
    batch = PairBatch.of([torch.rand(5, 4).double()] * 2, [ids] * 2, 2)
    means, weights = robustness._tilted(losses.detach(), batch, -0.7)
    for run in range(2):
        groups = gk.GroupWeights(2, estimator="group_mean", step_size=0.0, inner_tilt=-0.7)
        out = gk.GroupRobustLoss(groups).from_pair_losses(losses[run], ids)
        torch.testing.assert_close(means[run], out.group_losses.detach())
        (slopes,) = torch.autograd.grad(out.group_losses.sum(), losses)
        torch.testing.assert_close(weights[run] * batch.membership[run].sum(0), slopes[run])


def test_options_by_kind_of_data_notice_what_does_not_hold() -> None:
    """By hand: GR lower than IS by 0.1 in each seed of (ii), and not in (iii)."""
    names = [option.name for option in robustness.OPTIONS]
    record = [
        {"scenario": scenario, "option": name, **{m: [0.5, 0.7, 0.6] for m in ("worst", "group_1", "reward_error")}}
        for scenario in robustness.ALL_SCENARIOS
        for name in names
    ]
    robust = next(r for r in record if (r["scenario"], r["option"]) == ("ii", "GR"))
    robust["worst"] = [0.4, 0.6, 0.5]
    assert robustness.lead(record, "ii", "GR", "IS") == (pytest.approx(0.1), pytest.approx(0, abs=1e-9), 3)
    assert robustness.is_lower(record, "ii", "GR", "IS")
    assert not robustness.is_lower(record, "iii", "GR", "IS")
    assert not robustness.check(record)[0].holds
    lines = robustness.decisions(record).splitlines()
    assert "| GR | none | lower by 0.100 ± 0.000, in 3 of 3 seeds | +0.000 ± 0.000 |" in lines[3]
    assert "nothing helps" in lines[2]
    for scenario in ("ii", "iii"):
        next(r for r in record if (r["scenario"], r["option"]) == (scenario, "GR"))["worst"] = [0.4, 0.6, 0.5]
    assert robustness.check(record)[0].holds


def test_our_kinds_of_data() -> None:
    """The labels of group 0 are flipped, of the share that it says; held-out ones of the hard group only."""
    for scenario, share in robustness.FLIPPED.items():
        bandit = robustness.draw(scenario, 0)
        for pairs, flipped in ((bandit.train, share), (bandit.validation, share if scenario == "hard" else 0.0)):
            best = torch.stack([pairs.differences @ theta for theta in REWARD_THETA])
            wrong = torch.where(pairs.group_ids == 0, best[0], best[1]) < 0
            group_0 = wrong[pairs.group_ids == 0].double()
            assert not wrong[pairs.group_ids == 1].any()
            assert group_0.mean().item() == pytest.approx(
                flipped, abs=4 * math.sqrt(0.25 / len(group_0)) * (flipped > 0)
            )


def test_one_seed_has_no_spread() -> None:
    assert reproduce.summary(torch.tensor([2.0])) == {"mean": 2.0, "sd": 0.0, "per_seed": [2.0]}
