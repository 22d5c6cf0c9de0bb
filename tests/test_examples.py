"""The examples, run as a user runs them, on a tiny random model in a folder."""

import argparse
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torchrun import torchrun

from lora_kernels.ops.lora_linear import shared_dx
from lora_kernels.qualify import __main__ as qualification

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from lora_kernels import peft

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = "".join(f"The number {i} is followed by the number {i + 1}. " for i in range(400))
SMALL = ("--steps", "6", "--length", "32", "--rank", "4", "--learning-rate", "0.01")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<end>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=128,
    )
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example in this process; return its exit status, stdout and stderr."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(example, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{example}.py", *map(str, arguments)])
        status = 0
        try:
            importlib.import_module(example).main()
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return run


def numbers(stdout, label):
    """Return the numbers in the line that begins with `label`."""
    line = next(line for line in stdout.splitlines() if line.strip().startswith(label))
    return [float(n) for n in re.findall(r"-?\d+\.?\d*(?:e[+-]?\d+)?", line.strip()[len(label) :])]


def test_finetune(run, model_folder, text_file, tmp_path):
    from safetensors.torch import load_file

    out = tmp_path / "out"
    status, stdout, stderr = run(
        "finetune", "--model", model_folder, "--text", text_file, "--out", out, *SMALL
    )
    assert status == 0, stderr

    for column in range(2):  # both runs learn
        start = numbers(stdout, "validation loss at the start")[column]
        assert numbers(stdout, "validation loss at the end")[column] < start - 0.05
    (apart,) = numbers(stdout, "largest difference in loss")
    assert apart < 1e-3
    assert stdout.split("LoRA layers computed by")[1].split()[:2] == ["PEFT", "reference"]
    assert "14 of 14 PEFT layers fused" in stdout

    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["r"] == 4
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 14
    assert all(tensor.abs().max() > 0 for tensor in adapter.values())
    (moved,) = numbers(stdout, "it moves the logits by up to")
    differ, allowed = numbers(stdout, "fused and merged logits differ by")
    assert differ <= allowed < 1e-3 < 1e-2 < moved


@pytest.fixture(scope="session")
def alone(model_folder, tmp_path_factory):
    """The text, and the folder of one process that learnt it in SMALL."""
    out = tmp_path_factory.mktemp("alone")
    text = out / "text.txt"
    text.write_text(TEXT)
    finetuned(1, "--model", model_folder, "--text", text, "--out", out, *SMALL)
    return text, out


def finetuned(processes, *arguments, fails=False):
    """Run the fine-tuning in so many processes; return stdout and stderr."""
    done = torchrun(processes, EXAMPLES / "finetune.py", *arguments)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("options", [(), ("--fsdp",)], ids=["ddp", "fsdp"])
def test_two_processes_train_as_one_does(options, alone, model_folder, tmp_path):
    from safetensors.torch import load_file

    text, one = alone
    arguments = ("--model", model_folder, "--text", text, "--out", tmp_path, *SMALL)
    stdout, stderr = finetuned(2, *arguments, *options)
    assert stdout.count("14 of 14 PEFT layers fused") == 1
    assert stdout.split("LoRA layers computed by")[1].split()[:2] == ["PEFT", "reference"]
    assert "140 of 140 calls ran fused" in stdout  # by 14 layers: 6 steps, 4 times validation
    assert numbers(stdout, "largest difference in loss")[0] < 1e-5
    for label in ("plain PEFT", "fused"):  # one progress bar each
        assert len(re.findall(rf"{label} *: +0%[^\r\n]*\?step/s\]", stderr)) == 1
    files = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    expected = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    assert files == expected - {text.relative_to(one)}
    states = [load_file(out / "adapter" / "adapter_model.safetensors") for out in (one, tmp_path)]
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)


def test_two_processes_share_4bit_weights(model_folder, text_file, tmp_path):
    pytest.importorskip("bitsandbytes")
    arguments = ("--model", model_folder, "--text", text_file, "--out", tmp_path, *SMALL)
    stdout, _ = finetuned(2, *arguments, "--fsdp", "--load-in-4bit")
    assert "84 of 140 calls ran fused" in stdout  # the steps; inference is left to bitsandbytes
    assert numbers(stdout, "largest difference in loss")[0] < 1e-5
    differ, allowed = numbers(stdout, "fused and merged logits differ by")
    assert differ <= allowed < 1e-3


def test_a_batch_that_processes_cannot_share_is_named_once(model_folder, tmp_path):
    _, stderr = finetuned(2, "--out", tmp_path, "--batch", "3", fails=True)
    (message,) = (line for line in stderr.splitlines() if line.startswith("finetune.py: error"))
    assert message.endswith("argument --batch: must be a multiple of the 2 processes, got 3")


def test_finetune_over_4bit_weights(run, model_folder, text_file, tmp_path):
    pytest.importorskip("bitsandbytes")
    arguments = ("--model", model_folder, "--text", text_file, "--out", tmp_path, *SMALL)
    status, stdout, stderr = run("finetune", *arguments, "--load-in-4bit")
    assert status == 0, stderr
    assert "14 of 14 PEFT layers fused" in stdout
    assert numbers(stdout, "largest difference in loss")[0] < 1e-5
    differ, allowed = numbers(stdout, "fused and merged logits differ by")
    assert differ <= allowed < 1e-3


def test_finetune_fails_where_the_saved_adapter_is_not_the_trained_one(
    run, model_folder, text_file, tmp_path, monkeypatch
):
    from peft import PeftModel
    from safetensors.torch import load_file, save_file

    load = PeftModel.from_pretrained

    def load_corrupted(base, folder):
        path = folder / "adapter_model.safetensors"
        state = load_file(path)
        state[max(state)] *= 1.5
        save_file(state, path)
        return load(base, folder)

    monkeypatch.setattr(PeftModel, "from_pretrained", load_corrupted)
    status, _, stderr = run(
        "finetune", "--model", model_folder, "--text", text_file, "--out", tmp_path, *SMALL
    )
    assert status == 1
    assert "does not reproduce the fused model" in stderr.splitlines()[-1]


def test_finetune_lets_a_gpu_vouch_for_its_kernels_first(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "common", raising=False)
    finetune = importlib.import_module("finetune")
    commands = []
    monkeypatch.setattr(finetune.subprocess, "run", lambda command, check: commands.append(command))
    model = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
    for layer, (n, k) in zip(model, ((8, 4), (4, 8)), strict=True):
        layer.lora_A, layer.base_layer = None, torch.nn.Linear(k, n)
    for device in ("cpu", "cuda"):
        args = argparse.Namespace(
            device=torch.device(device), rank=4, dropout=0.1, dtype=torch.bfloat16
        )
        finetune.qualify(model, torch.zeros(3, 2, 16), args)
    (command,) = commands
    options = [
        *("--shapes", "4,8", "8,4", "--rank", "4", "--tokens", "32"),
        *("--dropout", "0.0", "0.1", "--dtype", "bfloat16"),
    ]
    assert command[1:3] == ["-m", "lora_kernels.qualify"]
    assert command[3:] == options
    qualification._options(qualification._parser().parse_args(command[3:]))


def test_finetune_times_a_shared_dx_and_separate_ones(
    run, model_folder, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(shared_dx, "FEW_BYTES", 1)
    asked, summed = [], set()
    fuse, add = peft.fuse, shared_dx.add

    def noted_fuse(model, **options):
        asked.append(options)
        return fuse(model, **options)

    def noted_add(*arguments):
        summed.add(len(asked))
        return add(*arguments)

    monkeypatch.setattr(peft, "fuse", noted_fuse)
    monkeypatch.setattr(shared_dx, "add", noted_add)
    arguments = ("--model", model_folder, "--text", text_file, "--out", tmp_path, *SMALL)
    status, stdout, stderr = run("finetune", *arguments)
    assert status == 0, stderr
    assert [asked.count(options) for options in ({}, {"share_inputs": False})] == [12, 10]
    assert summed == {n for n, options in enumerate(asked[:-1], 1) if not options}
    tokens, spread = numbers(stdout, "with share_inputs=False")
    assert 0 < spread < tokens


def test_finetune_with_dropout_says_that_the_runs_differ(run, model_folder, text_file, tmp_path):
    arguments = ("--model", model_folder, "--text", text_file, "--out", tmp_path, *SMALL)
    status, stdout, stderr = run(
        "finetune", *arguments, "--dropout", "0.2", "--targets", "q_proj,v_proj"
    )
    assert status == 0, stderr
    assert "different masks" in stdout
    assert "4 of 4 PEFT layers fused" in stdout


def test_finetune_in_bfloat16(run, model_folder, text_file, tmp_path):
    arguments = ("--model", model_folder, "--text", text_file, "--out", tmp_path, *SMALL)
    status, stdout, stderr = run("finetune", *arguments, "--dtype", "bfloat16")
    assert status == 0, stderr
    assert "torch.bfloat16" in stdout
    (apart,) = numbers(stdout, "largest difference in loss")
    assert apart < 0.05


def test_finetune_says_where_the_steps_ran_peft(
    run, model_folder, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("lora_kernels.peft.small.FEW_ROWS", 64)
    monkeypatch.setattr("lora_kernels.peft.linear.FusedLinear.usual", lambda layer, x: None)
    arguments = ("--model", model_folder, "--text", text_file, "--out", tmp_path, *SMALL)
    status, stdout, stderr = run("finetune", *arguments, "--batch", "1", "--targets", "q_proj")
    assert status == 0, stderr
    assert "x has fewer than 64 rows" in stdout
    assert stdout.split("LoRA layers computed by")[1].split()[:3] == ["PEFT", "PEFT", "largest"]


def test_initialisation(run, model_folder, text_file, tmp_path):
    status, stdout, stderr = run(
        "initialisation", "--model", model_folder, "--text", text_file, "--out", tmp_path, *SMALL
    )
    assert status == 0, stderr
    assert (tmp_path / "initialisation.png").read_bytes().startswith(b"\x89PNG")
    labels = "A random, B zero", "A zero, B random", "both zero", "both random"
    lora, mirrored, dead, disturbed = (
        dict(zip(("shift", "da", "db", "start", "end"), numbers(stdout, label), strict=True))
        for label in labels
    )
    assert lora["shift"] == mirrored["shift"] == dead["shift"] == 0 < disturbed["shift"]
    assert lora["da"] == 0 < lora["db"]
    assert mirrored["db"] == 0 < mirrored["da"]
    assert dead["da"] == dead["db"] == 0
    assert min(disturbed["da"], disturbed["db"]) > 0
    assert lora["start"] == mirrored["start"] == dead["start"] == dead["end"]
    assert max(lora["end"], mirrored["end"]) < lora["start"] < disturbed["start"]
    assert disturbed["end"] < disturbed["start"]


@pytest.mark.parametrize("example", ["finetune", "initialisation"])
def test_help_names_every_option(run, example):
    status, stdout, _ = run(example, "--help")
    assert status == 0
    options = re.findall(r"^  --([a-z-]+) ", stdout, re.MULTILINE)
    assert {"model", "text", "rank", "alpha", "targets", "steps", "batch"} <= set(options)
    assert {"length", "learning-rate", "out", "seed", "device", "dtype"} <= set(options)
    assert ("dropout" in options) == (example == "finetune")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "absent.txt"], "argument --text: cannot read absent.txt: No such file"),
        (["--text", "EMPTY"], "is empty"),
        (["--text", "SHORT", "--model", "MODEL"], "tokens; --length 128 needs at least 256"),
        (["--text", "BINARY"], "is not UTF-8"),
        (["--rank", "0"], "argument --rank: must be a whole number of at least 1, got 0"),
        (["--rank", "two"], "argument --rank: must be a whole number of at least 1, got two"),
        (["--steps", "-3"], "argument --steps: must be a whole number of at least 1, got -3"),
        (["--alpha", "nan"], "argument --alpha: must be a number above 0, got nan"),
        (["--dropout", "1"], "argument --dropout: must be a number in [0, 1), got 1"),
        (["--learning-rate", "0"], "argument --learning-rate: must be a number above 0, got 0"),
        (["--out", "EMPTY/results"], "argument --out: cannot write to "),
        (["--model", "NOWHERE"], "argument --model: cannot load "),
        (["--model", "MODEL", "--targets", "q_proj,z_proj"], "the model has no layer 'z_proj'"),
        (["--model", "MODEL", "--targets", "input_layernorm"], "argument --targets: "),
        (["--model", "MODEL", "--length", "999"], "argument --length: "),
        (["--fsdp"], "argument --fsdp: start several processes, by torchrun"),
    ],
)
def test_mistakes_are_named_in_one_line(run, arguments, message, model_folder, tmp_path):
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "short").write_text("too short")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "nowhere").mkdir()
    names = {name.upper(): str(tmp_path / name) for name in ("empty", "short", "binary", "nowhere")}
    names["MODEL"] = str(model_folder)
    for name, path in names.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    status, _, stderr = run("finetune", "--out", tmp_path / "out", *arguments)
    assert status == 2, stderr
    assert message in stderr
    assert len(stderr.splitlines()) == 1
