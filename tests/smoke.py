"""An installed grpo_kernels, tried as a user would, outside a checkout: ``python smoke.py [backends it must have]``.

The loss and its gradient on every backend that can run here, `doctor`, and ten steps with TRL.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import grpo_kernels as gk

CHECKOUT = Path(__file__).resolve().parent.parent


def loss_and_gradient(backend: str) -> tuple[float, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 5, 300, generator=generator).requires_grad_()
    labels = torch.randint(300, (8, 5), generator=generator)
    group_ids, ref_logps = torch.tensor([0, 1, 1, 0]), torch.randn(8, generator=generator) - 30
    groups = gk.GroupWeights(group_sizes=[20, 10], step_size=0.1)
    out = gk.GroupRobustLoss(groups, backend=backend)(logits, labels, group_ids, ref_logps=ref_logps)
    out.loss.backward()
    return out.loss.item(), logits.grad, groups.alpha


def backends(must: set[str]) -> None:
    usable = {name for name, why_not in gk.backends().items() if not why_not}
    assert must <= usable, f"{must - usable} cannot be used here"
    expected = loss_and_gradient("reference")
    for name in sorted(usable):
        torch.testing.assert_close(loss_and_gradient(name), expected, rtol=1e-5, atol=1e-6)
    print(f"the loss on {', '.join(sorted(usable))}")


def trl() -> None:
    from datasets import Dataset

    from grpo_kernels.integrations.transformers import byte_level_tokenizer, small_llama
    from grpo_kernels.integrations.trl import GroupRobustDPOConfig, GroupRobustDPOTrainer

    pairs = [
        {"prompt": f"{i} + {i} =", "chosen": f" {2 * i}", "rejected": f" {2 * i + 1}", "group": "ab"[i % 2]}
        for i in range(40)
    ]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        args = GroupRobustDPOConfig(
            folder,
            max_steps=10,
            learning_rate=1e-2,
            logging_steps=1,
            precompute_ref_log_probs=True,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        trainer = GroupRobustDPOTrainer(
            small_llama(300, hidden_size=16, num_layers=1, max_length=64, pad_id=0),
            args=args,
            train_dataset=Dataset.from_list(pairs),
            processing_class=byte_level_tokenizer([], 300),
        )
        trainer.train()
    losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    assert len(losses) == 10, losses
    assert losses[-1] < losses[0], losses
    print(f"ten steps with TRL: loss {losses[0]:.3f} to {losses[-1]:.3f}")


def main() -> int:
    assert not Path(gk.__file__).is_relative_to(CHECKOUT / "grpo_kernels"), (
        "this is the checkout, not what was installed"
    )
    backends(set(sys.argv[1:]))
    trl()
    subprocess.run([sys.executable, "-m", "grpo_kernels", "doctor"], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
