"""GroupRobustDPOTrainer's evaluations: ties and standard errors; options that come as JSON from a command line."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'grpo-kernels[trl]'")

from datasets import Dataset  # noqa: E402

from grpo_kernels.integrations import transformers as hf  # noqa: E402
from grpo_kernels.integrations.trl import GroupRobustDPOConfig, GroupRobustDPOTrainer  # noqa: E402


def evaluation(folder: Path, rows: list[dict[str, str]], *, same_reference: bool) -> dict[str, float]:
    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        return hf.small_llama(300, hidden_size=32, num_layers=1, max_length=64, pad_id=0)

    args = GroupRobustDPOConfig(
        str(folder), bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, beta=5.0, save_strategy="no"
    )
    data, reference = Dataset.from_list(rows), model(0 if same_reference else 1)
    tokenizer = hf.byte_level_tokenizer([], 300)
    return GroupRobustDPOTrainer(model(0), reference, args, None, data, data, processing_class=tokenizer).evaluate()


def test_standard_errors_are_those_of_the_pairs(tmp_path: Path) -> None:
    """Each pair alone in a group of its own gives its loss and hit."""
    rows = [{"prompt": f"{i}?", "chosen": f" yes {i * i}", "rejected": f" no {i}"} for i in range(5)]
    apart = evaluation(tmp_path, [{**row, "group": str(i)} for i, row in enumerate(rows)], same_reference=False)
    together = evaluation(tmp_path, [{**row, "group": "all"} for row in rows], same_reference=False)
    for name in ("loss", "accuracy"):
        values = torch.tensor([apart[f"eval_groups/{i}/{name}"] for i in range(5)], dtype=torch.float64)
        assert together[f"eval_groups/all/{name}_se"] == pytest.approx((values.std() / math.sqrt(5)).item(), rel=1e-5)
        assert f"eval_groups/0/{name}_se" not in apart, "one pair has none"
    assert together["eval_groups/all/loss_se"] > 0


def test_a_tie_is_half_a_hit(tmp_path: Path) -> None:
    """Against itself a policy prefers neither answer."""
    rows = [{"prompt": "?", "chosen": " yes", "rejected": " no", "group": "all"}] * 4
    assert evaluation(tmp_path, rows, same_reference=True)["eval_groups/all/accuracy"] == 0.5


def test_dict_options_on_a_command_line() -> None:
    parse = trl.TrlParser(GroupRobustDPOConfig).parse_args_and_config
    common = ["--output_dir", "out", "--report_to", "none", "--bf16", "False", "--use_cpu", "True"]
    options = ["--group_options", '{"floor": 0.05, "rule": "exponentiated_gradient"}', "--group_sizes", '{"a": 3}']
    (config,) = parse([*common, *options, "--model_init_kwargs", '{"dtype": "float32"}'])
    assert config.group_options == {"floor": 0.05, "rule": "exponentiated_gradient"}
    assert config.group_sizes == {"a": 3}
    assert config.model_init_kwargs == {"dtype": "float32"}
    with pytest.raises(TypeError, match="group_options must be a dict, or one as JSON, got 'floor=1'"):
        parse([*common, "--group_options", "floor=1"])
