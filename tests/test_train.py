"""`python -m grpo_kernels train`: arms, data, options, and what a stop, a kill or a full disk leaves."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'grpo-kernels[train]'")

import datasets  # noqa: E402
import forks  # noqa: E402
import transformers  # noqa: E402

from grpo_kernels.__main__ import main  # noqa: E402
from grpo_kernels.integrations import callbacks, checkpoints  # noqa: E402
from grpo_kernels.integrations import transformers as hf  # noqa: E402
from grpo_kernels.training.command import ARMS  # noqa: E402

ROWS = [
    {
        "prompt": f"What is {i}+{i}?",
        "chosen": f" It is {2 * i}.",
        "rejected": f" It is {2 * i + 1}!",
        "group": "ab"[i % 3 == 0],
    }
    for i in range(24)
]
GROUPS = ("a", "b")
FAST = ["--max_length", "64", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--disable_tqdm", "True"]
FAST += ["--gradient_checkpointing", "False", "--max_steps", "4", "--eval_steps", "2", "--save_steps", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny Llama and a tokenizer that has a chat template."""
    folder = str(tmp_path_factory.mktemp("model"))
    torch.manual_seed(0)
    hf.small_llama(300, hidden_size=32, num_layers=1, max_length=64, pad_id=0).save_pretrained(folder)
    tokenizer = hf.byte_level_tokenizer([], 300)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _cheap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return written(tmp_path / "pairs.jsonl", ROWS)


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def command(*words: Any) -> list[str]:
    return ["train", *FAST, *map(str, words)]


def records(out: Path, arm: str = "robust") -> list[dict[str, Any]]:
    """The arm's log without what a clock has to do with."""
    clock = ("runtime", "per_second", "flos", "num_tokens")
    lines = [json.loads(line) for line in (out / arm / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if not k.endswith(clock)} for line in lines if "train_runtime" not in line]
    return kept


def weights(out: Path, arm: str = "robust") -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(out / arm / "model").state_dict()


def assert_same_run(one: Path, other: Path) -> None:
    assert records(one) == records(other)
    theirs = weights(other)
    assert all(torch.equal(value, theirs[name]) for name, value in weights(one).items())


def step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


# -- arms --------------------------------------------------------------------------------------------------------------


def test_three_arms_from_one_start(tmp_path: Path, capsys: pytest.CaptureFixture[str], data: str) -> None:
    """Without --model: a small Llama of its own, warmed up."""
    out = tmp_path / "out"
    assert main(command("--data", data, "--compare", "--sft_steps", 2, "--samples", 1, "--out", out)) == 0
    shown, results = capsys.readouterr().out, json.loads((out / "results.json").read_text())
    assert list(results["runs"]) == ["plain", "IS", "robust"]
    for arm, run in results["runs"].items():
        assert (run["start"]["step"], run["last"]["step"]) == (0, 4)
        assert run["best"]["worst_loss"] == min(
            r["eval_groups/worst_loss"] for r in records(out, arm)[1:] if "eval_loss" in r
        )
        for group, count in (("a", 3), ("b", 2)):
            scores = run["best"]["groups"][group]
            assert scores["count"] == results["eval_pairs"][group] == count
            assert scores["loss_se"] > 0
            assert f"{scores['loss']:.3f} ± {scores['loss_se']:.3f}" in shown
            assert run["start"]["groups"][group]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        ((prompt, answer),) = results["samples"][arm]
        assert prompt.startswith("What is ")
        assert isinstance(answer, str)
        assert transformers.AutoTokenizer.from_pretrained(out / arm / "model").eos_token == "</s>"
    alphas = {arm: [run["last"]["groups"][group]["alpha"] for group in GROUPS] for arm, run in results["runs"].items()}
    assert alphas["plain"] == pytest.approx([13 / 19, 6 / 19])
    assert alphas["IS"] == pytest.approx([0.5, 0.5])
    assert alphas["robust"] != pytest.approx([0.5, 0.5], abs=1e-6)
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")


def test_a_mixture_of_losses(tmp_path: Path, data: str) -> None:
    """A small model that is not warmed up: the loss begins at apo_zero's 1 and sft's log V."""
    out = tmp_path / "run"
    words = ["--loss", "apo_zero", "sft", "--sft_steps", 0, "--log_token_metrics", "--out", out]
    assert main(command("--data", data, *words)) == 0
    first, *_, last = records(out)
    assert first["eval_loss"] == pytest.approx(1 + first["eval_entropy"], abs=0.1), "nearly uniform over the tokens"
    assert last["eval_loss"] < first["eval_loss"] - 0.1
    facts = json.loads((out / "results.json").read_text())
    assert facts["loss_type"] == "apo_zero + sft"


def test_the_plain_arm_is_trls_dpo(tmp_path: Path, data: str, model: str) -> None:
    """The same losses and weights as TRL's own trainer on the same pairs. (Float32: it weighs each pair by 1.)"""
    out = tmp_path / "out"
    assert main(command("--data", data, "--eval_data", data, "--model", model, "--compare", "--out", out)) == 0
    args = trl.DPOConfig(
        str(tmp_path / "trl"), max_length=64, per_device_train_batch_size=4, learning_rate=1e-2, max_steps=4,
        logging_steps=1, gradient_checkpointing=False, bf16=False, report_to="none", save_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True,
    )  # fmt: skip
    rows = datasets.load_dataset("json", data_files=data, split="train")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    theirs = trl.DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    theirs.train()
    expected = [record["rewards/margins"] for record in theirs.state.log_history if "loss" in record]
    ours = [record["rewards/margins"] for record in records(out, "plain") if "loss" in record]
    assert len(expected) == 4
    assert ours == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_messages_go_through_the_chat_template(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows = [
        {
            "prompt": turn("user", row["prompt"]),
            **{name: turn("assistant", row[name]) for name in ("chosen", "rejected")},
            "group": ("a", "b")[i % 2],
        }
        for i, row in enumerate(ROWS)
    ]
    data, out = written(tmp_path / "pairs.jsonl", rows), tmp_path / "out"
    assert main(command("--data", data, "--model", model, "--max_steps", 1, "--samples", 1, "--out", out)) == 0
    ((prompt, _),) = json.loads((out / "results.json").read_text())["samples"]["robust"]
    assert prompt.startswith("u:What is ")
    assert prompt.endswith("a:")
    assert main(command("--data", data, "--out", tmp_path / "small")) == 2
    assert "messages need a chat template" in capsys.readouterr().err


def test_pairs_that_max_length_leaves_out_are_said_and_not_counted(tmp_path: Path, model: str) -> None:
    rows = [*ROWS, {**ROWS[0], "prompt": "long " * 50}, {**ROWS[1], "prompt": ""}]
    data, out = written(tmp_path / "pairs.jsonl", rows), tmp_path / "out"
    words = command("--data", data, "--eval_data", data, "--model", model, "--max_steps", 1, "--out", out)
    with pytest.warns(UserWarning, match="fills max_length") as seen:
        assert main(words) == 0
    said = [str(warning.message) for warning in seen]
    for which in ("train", "eval"):
        assert any(s.startswith(f"{which} data: 1 of 26 pairs have a prompt that fills max_length=64") for s in said)
        assert any(s.startswith(f"{which} data: 1 of 26 pairs begin with their answer's tokens") for s in said)
    results = json.loads((out / "results.json").read_text())
    assert results["groups"] == results["eval_pairs"] == {"a": 17, "b": 8}
    assert json.loads((out / "run.json").read_text())["groups"] == {"a": 17, "b": 9}, "what the file has"


def test_lora_saves_adapters_that_began_alike(
    tmp_path: Path, data: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing moves them here; and the reference, the model without them, is computed once for all arms."""
    out, batches, of_batch = tmp_path / "out", [], checkpoints.ResumableTrainer.compute_ref_log_probs

    def counted(self: Any, model: Any, inputs: Any) -> Any:
        batches.append(len(inputs["input_ids"]) // 2)
        return of_batch(self, model, inputs)

    monkeypatch.setattr(checkpoints.ResumableTrainer, "compute_ref_log_probs", counted)
    lora = ["--use_peft", "--lora_r", 2, "--lora_target_modules", "q_proj", "v_proj", "--learning_rate", 0]
    assert main(command("--data", data, "--model", model, *lora, "--compare", "--max_steps", 2, "--out", out)) == 0
    assert sum(batches) == 19 + 5
    saved = {path.name for path in (out / "robust" / "model").iterdir()}
    assert "model.safetensors" not in saved
    plain, *others = ((out / arm / "model" / "adapter_model.safetensors").read_bytes() for arm in ARMS)
    assert others == [plain, plain]


# -- stops -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert (
        main(command("--data", written(folder / "pairs.jsonl", ROWS), "--model", model, "--out", folder / "out")) == 0
    )
    return folder / "out"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(
    number: int, status: int, tmp_path: Path, data: str, model: str, uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, log = tmp_path / "out", callbacks.Metrics.on_log

    def log_and_stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        log(self, args, state, control, **kwargs)
        if state.global_step == 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(callbacks.Metrics, "on_log", log_and_stop)
    assert main(command("--data", data, "--model", model, "--out", out)) == status
    monkeypatch.undo()
    assert f"go on with: python -m grpo_kernels train --resume --out {out}" in capfd.readouterr().err
    stopped = checkpoints.newest_whole(out / "robust")
    assert step_of(Path(stopped)) in (1, 2)
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert_same_run(uninterrupted, out)


def test_a_checkpoint_that_is_not_whole_is_passed_over(
    tmp_path: Path, data: str, model: str, uninterrupted: Path
) -> None:
    """One was cut short, and the arm is not done: the run goes on from the one before, to the same end."""
    out = tmp_path / "out"
    assert main(command("--data", data, "--model", model, "--out", out)) == 0
    (out / "robust" / "model").rename(tmp_path / "away")
    optimizer = out / "robust" / "checkpoint-4" / "optimizer.pt"
    os.truncate(optimizer, optimizer.stat().st_size // 2)
    with pytest.warns(UserWarning, match=r"checkpoint-4 is not whole \(optimizer.pt\): passed over"):
        assert main(["train", "--resume", "--out", str(out)]) == 0
    assert_same_run(uninterrupted, out)
    assert sorted(path.name for path in (out / "robust").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert checkpoints.newest_whole(out / "robust") == str(out / "robust" / "checkpoint-4")


class Killed(BaseException):
    """Nothing of ours catches it, as nothing catches kill -9."""


def test_a_kill_while_files_are_written_loses_nothing(
    tmp_path: Path, data: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed five times on the way, before a call with a file that ends so; resumed each time."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    words = command("--data", data, "--model", model, "--eval_steps", 1, "--save_steps", 1)
    assert main([*words, "--out", str(whole)]) == 0
    words += ["--out", str(out)]
    for owner, name, file in (
        (Path, "write_text", "checkpoint-1/files.json"),  # its weights are there already
        (os, "rename", "robust/checkpoint-2"),
        (os, "unlink", "optimizer.pt"),  # of the oldest checkpoint, which makes room
        (os, "rename", "robust/model"),
        (os, "rename", "out/results.json"),
    ):
        call = getattr(owner, name)

        def killed(*args: Any, call: Any = call, file: str = file, **options: Any) -> Any:
            if any(str(arg).endswith(file) for arg in args):
                raise Killed
            return call(*args, **options)

        with monkeypatch.context() as patched:
            patched.setattr(owner, name, killed)
            with pytest.raises(Killed):
                main(words)
        words = ["train", "--resume", "--out", str(out)]
    assert main(words) == 0
    assert_same_run(whole, out)
    assert not list(out.rglob("*.part"))


def test_a_full_disk_is_named_and_the_last_good_checkpoint_stays(
    tmp_path: Path, data: str, model: str, uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, log = tmp_path / "out", callbacks.Metrics.on_log
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        log(self, args, state, control, **kwargs)
        if state.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, unlimited[1]))  # writing more fails, as on a full disk

    monkeypatch.setattr(callbacks.Metrics, "on_log", fill_the_disk)
    try:
        status = main(command("--data", data, "--model", model, "--out", out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    monkeypatch.undo()
    assert status == 2
    message = capsys.readouterr().err.splitlines()[-1]
    good = out / "robust" / "checkpoint-2"
    assert f"{out}/robust/checkpoint-4 could not be written" in message
    assert f"the last good checkpoint is {good}" in message
    assert [path.name for path in (out / "robust").glob("*checkpoint*")] == ["checkpoint-2"]
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert_same_run(uninterrupted, out)


def test_an_arm_that_has_stopped_early_goes_no_step_further(tmp_path: Path, data: str, model: str) -> None:
    """Killed after its last checkpoint, before its model. Nothing moves: the evaluations at 4 and 6 are no better."""
    out = tmp_path / "out"
    words = ["--learning_rate", 0, "--max_steps", 8, "--early_stopping_patience", 2, "--save_total_limit", 3]
    assert main(command("--data", data, "--model", model, *words, "--out", out)) == 0
    stopped = records(out)
    assert stopped[-1]["step"] == 6
    (out / "robust" / "model").rename(tmp_path / "away")
    assert step_of(Path(checkpoints.to_go_on_from(out / "robust"))) == 4
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert records(out) == stopped


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_named_where_the_log_is_written() -> None:
    metrics, state = callbacks.Metrics(Path("/dev/full")), transformers.TrainerState(log_history=[{"loss": 1.0}])
    for write in (metrics.on_train_begin, metrics.on_log):
        with pytest.raises(OSError, match=r"/dev/full could not be written: .*No space left"):
            write(None, state, None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"[1]"),
        ("config.json", b'{"model_type": "llama", "num_attention_heads": 0}'),
        ("tokenizer.json", b""),
        ("tokenizer_config.json", b"[1]"),
        ("model.safetensors", b"cut"),
    ],
)
def test_a_damaged_model_is_named(
    name: str, content: bytes, tmp_path: Path, data: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    (copy / name).write_bytes(content)
    assert main([*command("--data", data, "--model", copy, "--out", tmp_path / "out"), "--max_steps", "1"]) == 2
    assert f"train: model '{copy}' cannot be loaded: " in capsys.readouterr().err.splitlines()[-1]


def test_what_else_is_wrong_with_a_trainer_is_not_its_model_s_fault(data: str, model: str, capsys: Any) -> None:
    assert main(command("--data", data, "--model", model, "--out", "out", "--margin_column", "none")) == 2
    assert "grpo_kernels train: train_dataset must have a column 'none'" in capsys.readouterr().err


def test_one_run_in_a_folder(tmp_path: Path, data: str, model: str, uninterrupted: Path, capsys: Any) -> None:
    with checkpoints.alone_in(tmp_path / "out"):
        assert main(command("--data", data, "--model", model, "--out", tmp_path / "out")) == 2
    assert "out must not be in use, another run is writing to" in capsys.readouterr().err
    assert main(command("--data", data, "--model", model, "--out", uninterrupted)) == 2
    assert "out must not hold a run already" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(tmp_path / "none")]) == 2
    assert "out must hold a run to resume" in capsys.readouterr().err


def test_resume_refuses_what_has_changed(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    copy, file, out = tmp_path / "copy", tmp_path / "rows.jsonl", tmp_path / "out"
    transformers.AutoModelForCausalLM.from_pretrained(model).save_pretrained(copy)
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(copy)
    settings = tmp_path / "settings.yaml"
    settings.write_text("beta: 0.2\ngroup_options: {floor: 0.1}\n")
    words = command(
        "--data", written(file, ROWS), "--model", copy, "--config", settings, "--out", out, "--max_steps", 1
    )
    assert main(words) == 0
    assert json.loads((out / "results.json").read_text())["beta"] == 0.2

    def refusal(*words: str) -> str:
        capsys.readouterr()
        assert main(["train", "--resume", "--out", str(out), *words]) == 2
        return capsys.readouterr().err

    for words, said in (
        (
            ["--group_options", '{"floor": 0.2}'],
            "group_options must be that of the run to resume: was {'group_sizes': ",
        ),
        (["--group_options", '{"floor": 0.1, "chi": 0.5}'], "'chi': 0.5"),
        (
            ["--group_options", '{"rule": "cvar", "level": 0.5}'],
            "step_size must be that of the run to resume: was 0.07",
        ),
        (["--baseline", "running"], "'baseline': 'running'"),
        (["--group_estimator", "group_mean"], "'estimator': 'group_mean'"),
        (["--group_sizes", '{"a": 2, "b": 1}'], "is {'group_sizes': {'a': 2, 'b': 1}"),
        (["--step-size", "0.5"], "step_size must be that of the run to resume: was 0.07"),
        (["--label_smoothing", "0.1"], "loss_options must be that of the run to resume: was {'label_smoothing': 0.0"),
        (["--max_length", "32"], "'max_length': 32"),
    ):
        assert said in refusal(*words), words
    assert main(["train", "--resume", "--out", str(out), "--group_options", '{"floor": 0.1}']) == 0

    written(file, [{**row, "chosen": row["chosen"] + "!"} for row in ROWS])
    assert "data must be that of the run to resume: changed since" in refusal()
    written(file, [{**row, "group": "north"} for row in ROWS])
    assert "groups must be that of the run to resume: was {'a': 13, 'b': 6}, is {'north': 19}" in refusal()
    written(file, ROWS)
    settings.write_text("beta: 0.2\ngroup_options: {floor: 0.1}\nlearning_rate: 0.1\n")
    assert "config must be that of the run to resume" in refusal()
    settings.write_text("beta: 0.2\ngroup_options: {floor: 0.1}\n")
    with (copy / "model.safetensors").open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"\1")
    assert "model must be that of the run to resume: changed since" in refusal()


# -- processes of their own --------------------------------------------------------------------------------------------


def run(words: list[str]) -> None:
    assert main(words) == 0


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, data: str, model: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = command("--data", data, "--model", model, "--max_steps", 40)
    assert main([*words, "--out", str(whole)]) == 0
    process, deadline = forks.start(run, [*words, "--out", str(killed)]), time.monotonic() + 200
    while not list((killed / "robust").glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (killed / "robust" / "model").exists(), "it was killed on the way"
    assert main(["train", "--resume", "--out", str(killed)]) == 0
    assert_same_run(whole, killed)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_are_one_run(tmp_path: Path, data: str, model: str, uninterrupted: Path) -> None:
    """The run of one process, and what two have saved goes on in one."""
    out = tmp_path / "out"
    words = command("--data", data, "--model", model, "--per_device_train_batch_size", 2, "--out", out)
    forks.run_on_ranks(2, run, words)
    assert_close_runs(uninterrupted, out)
    (out / "robust" / "model").rename(tmp_path / "two")
    (out / "robust" / "checkpoint-4").rename(tmp_path / "later")
    assert main(["train", "--resume", "--out", str(out)]) == 2  # half a batch
    assert main(["train", "--resume", "--out", str(out), "--per_device_train_batch_size", "4"]) == 0
    assert_close_runs(uninterrupted, out)


def assert_close_runs(one: Path, other: Path) -> None:
    """Losses and alpha of each step; float32's rounding, in another order of additions, through 4 steps of AdamW."""
    for ours, theirs in zip(records(one), records(other), strict=True):
        for name in (
            "loss",
            "groups/a/alpha",
            "groups/b/alpha",
            "eval_groups/a/loss",
            "eval_groups/b/loss",
            "eval_loss",
        ):
            if name in ours:
                assert theirs[name] == pytest.approx(ours[name], abs=1e-5), (name, ours["step"])
