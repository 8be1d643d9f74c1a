"""The command line from the outside: what it does, and how it refuses bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import random_model, transformers_model
from rich.control import strip_control_codes
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from kexaone import Config, KExaone
from kexaone.__main__ import main
from kexaone.model import demo, generation
from kexaone.model.tokenizer import byte_tokenizer
from kexaone.model.trainer import Trainer

TEXT = (b"def add(first, second):\n    return first + second\n\n\n") * 200
TINY = dataclasses.replace(Config.preset("mini"), windows=(8, 0), num_experts=8)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kexaone", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "model"
    random_model(TINY).save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_info_counts_exactly(run, tmp_path):
    code, out, _ = run("info", "k-exaone-236b", "--json", tmp_path / "x.json")
    assert code == 0
    counts = json.loads((tmp_path / "x.json").read_text())["parameters"]
    assert counts["total"] == 236_571_156_352 + 528_513_280
    assert "236,571,156,352" in out and "528,513,280" in out


def test_info_of_a_folder(run, checkpoint):
    code, out, _ = run("info", checkpoint)
    assert code == 0 and f"{TINY.parameter_counts()['total']:,}" in out


def test_generate_prints_prompt_and_continuation(run, checkpoint, tmp_path):
    code, out, err = run(
        "generate", checkpoint, "--prompt", "def ", "--max-new-tokens", 9,
        "--json", tmp_path / "x.json",
    )  # fmt: skip
    written = json.loads((tmp_path / "x.json").read_text())
    ids = list(b"def ")
    expected = KExaone.from_pretrained(checkpoint).generate([ids], max_new_tokens=9).token_ids[0]
    assert code == 0 and written["prompt_ids"] == ids and written["token_ids"] == expected
    assert out.startswith("def ") and "tokens/s" in err


def test_generate_ends_before_a_stop_text(run, checkpoint, tmp_path):
    common = ["generate", checkpoint, "--prompt", "def ", "--max-new-tokens", 60, "--json"]
    assert run(*common, tmp_path / "whole.json")[0] == 0
    whole = json.loads((tmp_path / "whole.json").read_text())
    stop = whole["text"][-1]
    code, out, _ = run(*common, tmp_path / "x.json", "--stop", stop, "--stop", "no such text")
    written = json.loads((tmp_path / "x.json").read_text())
    assert code == 0 and written["text"] == whole["text"][: whole["text"].index(stop)]
    assert out == "def " + written["text"]
    count = len(written["token_ids"])
    assert written["token_ids"] == whole["token_ids"][:count]


def test_generate_answers_by_the_template_and_with_float8(run, checkpoint, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if enable_thinking %}<t>{% endif %}"
    )
    code, _, _ = run(
        "generate", folder, "--chat", "hi", "--system", "be brief", "--thinking", "--fp8",
        "--drafts", "auto", "--max-new-tokens", 5, "--json", tmp_path / "x.json",
    )  # fmt: skip
    written = json.loads((tmp_path / "x.json").read_text())
    assert code == 0
    assert bytes(written["prompt_ids"]) == b"[system] be brief\n[user] hi\n<t>"
    expected = KExaone.from_pretrained(folder, fp8="quantize").generate(
        [written["prompt_ids"]], max_new_tokens=5
    )
    assert written["token_ids"] == expected.token_ids[0]


def test_generate_on_a_folder_written_by_transformers(run, tmp_path):
    """Weights by transformers, a trained BPE by tokenizers; transformers is the oracle too."""
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TEXT.decode()] * 3,
        trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False),
    )
    model = random_model(dataclasses.replace(TINY, eos_token_ids=(), pad_token_id=None))
    other = transformers_model(model)
    other.save_pretrained(tmp_path / "m")
    bpe.save(str(tmp_path / "m" / "tokenizer.json"))
    code, _, _ = run(
        "generate", tmp_path / "m", "--prompt", "return first", "--max-new-tokens", 12,
        "--json", tmp_path / "x.json",
    )  # fmt: skip
    written = json.loads((tmp_path / "x.json").read_text())
    ids = torch.tensor([bpe.encode("return first").ids])
    theirs = other.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert code == 0 and written["token_ids"] == theirs.tolist()


def test_train_resume_generate(run, text, tmp_path):
    out = tmp_path / "run"
    common = ["--out", out, "--data", text, "--batch-size", 2, "--sequence-length", 32]
    assert run("train", *common, "--steps", 2, "--save-every", 1)[0] == 0
    code, _, _ = run(
        "train", *common, "--steps", 3, "--save-every", 1, "--resume",
        "--json", tmp_path / "x.json",
    )  # fmt: skip
    written = json.loads((tmp_path / "x.json").read_text())
    assert code == 0 and written["resumed_from"] == 2 and written["steps"] == 3
    assert [step for step, _ in written["losses"]] == [3]
    assert run("generate", out / "model", "--prompt", "def", "--max-new-tokens", 2)[0] == 0
    for extra in (["--steps", 3], ["--steps", 9, "--seed", 1]):
        code, _, err = run("train", *common, "--save-every", 1, "--resume", *extra)
        assert code == 2 and err.count("\n") == 1


def test_demo_writes_what_it_printed(run, text, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "MIN_STEPS", 8)
    code, out, _ = run(
        "demo", "--out", tmp_path / "d", "--minutes", 0.02, "--tokens", 8,
        "--json", tmp_path / "x.json", "--data", text,
    )  # fmt: skip
    written = json.loads((tmp_path / "x.json").read_text())
    assert code == 0
    # a terminal is not sent control characters
    assert strip_control_codes(written["text"]) in out
    assert f"{written['validation_loss']:.3f}" in out
    assert f"{written['speedup']:.2f}x" in out and f"{written['bigram_entropy']:.3f}" in out
    assert written["losses"][-1][1] < written["losses"][0][1]
    assert (tmp_path / "d" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert KExaone.from_pretrained(tmp_path / "d" / "model").config == Config.preset("mini")


BAD = {
    "unknown command": (["tune-everything"], "No such command"),
    "unknown option": (["info", "--depth", "3"], "No such option"),
    "unknown preset": (["info", "giant"], "neither a preset"),
    "train an unknown preset": (["train", "--out", "{tmp}/o", "--preset", "giant"], "giant"),
    "preset beside a model": (
        ["train", "--out", "{tmp}/o", "--preset", "mini", "--model", "{model}"],
        "either --preset or --model",
    ),
    "generate without a folder": (["generate", "{tmp}/none", "--prompt", "x"], "none"),
    "generate without a prompt": (["generate", "{model}"], "--prompt"),
    "prompt twice": (["generate", "{model}", "--prompt", "a", "--prompt-file", "b"], "--prompt"),
    "missing prompt file": (["generate", "{model}", "--prompt-file", "{tmp}/none"], "none"),
    "prompt and chat": (["generate", "{model}", "--prompt", "a", "--chat", "b"], "--chat"),
    "chat without a template": (["generate", "{model}", "--chat", "b"], "no chat template"),
    "thinking without chat": (["generate", "{model}", "--prompt", "a", "--thinking"], "--chat"),
    "empty stop text": (["generate", "{model}", "--prompt", "a", "--stop", ""], "stop text"),
    "drafts of no number": (["generate", "{model}", "--prompt", "a", "--drafts", "x"], "auto"),
    "empty prompt": (["generate", "{model}", "--prompt", ""], "prompt"),
    "prompt too long": (["generate", "{model}", "--prompt-file", "{long}"], "context"),
    "negative drafts": (["generate", "{model}", "--prompt", "a", "--drafts", "-1"], "drafts"),
    "too many drafts": (["generate", "{model}", "--prompt", "a", "--drafts", "5"], "0..4"),
    "no new tokens": (["generate", "{model}", "--prompt", "a", "--max-new-tokens", "0"], ">= 1"),
    "huge seed": (["generate", "{model}", "--prompt", "a", "--seed", str(2**70)], "seed"),
    "prompt of no text": (["generate", "{model}", "--prompt", "\udcff"], "UTF-8"),
    "prompt file is a folder": (["generate", "{model}", "--prompt-file", "{tmp}"], "directory"),
    "prompt file of no text": (["generate", "{model}", "--prompt-file", "{binary}"], "UTF-8"),
    "device without memory": (["generate", "{model}", "--prompt", "a", "--device", "meta"], "meta"),
    "model is a file": (["generate", "{short}", "--prompt", "a"], "short"),
    "json where nothing can be": (["info", "--json", "/proc/x.json"], "/proc"),
    "out where nothing can be": (["train", "--out", "/proc/o", "--data", "{long}"], "/proc"),
    "no context": (["info", "--context", "0"], "context"),
    "bad top-p": (["generate", "{model}", "--prompt", "a", "--top-p", "2"], "top_p"),
    "bad dtype": (["generate", "{model}", "--prompt", "a", "--dtype", "int8"], "dtype"),
    "bad device": (["generate", "{model}", "--prompt", "a", "--device", "tpu9"], "tpu9"),
    "json in no folder": (["info", "--json", "{tmp}/none/x.json"], "no such folder"),
    "missing data": (["train", "--out", "{tmp}/o", "--data", "{tmp}/none"], "none"),
    "empty data": (["train", "--out", "{tmp}/o", "--data", "{empty}"], "empty"),
    "short data": (["train", "--out", "{tmp}/o", "--data", "{short}"], "too short"),
    "out is a file": (["train", "--out", "{short}", "--data", "{long}"], "short"),
    "no steps": (["train", "--out", "{tmp}/o", "--data", "{long}", "--steps", "0"], "steps"),
    "resume nothing": (["train", "--out", "{tmp}/o", "--data", "{long}", "--resume"], "resume"),
    "sequences too long": (
        ["train", "--out", "{tmp}/o", "--data", "{long}", "--sequence-length", "300000"],
        "context",
    ),
    "endless rate": (
        ["train", "--out", "{tmp}/o", "--data", "{long}", "--learning-rate", "1e300"],
        "learning_rate",
    ),
    "huge training seed": (["train", "--out", "{tmp}/o", "--seed", str(2**70)], "seed"),
    "pass too large": (["train", "--out", "{tmp}/o", "--batch-size", "1000000"], "accumulation"),
    "more than fits": (
        ["train", "--out", "{tmp}/o", "--preset", "k-exaone-236b", "--tokenizer", "{model}"],
        "GiB of memory",
    ),
    "tokenizer missing": (["train", "--out", "{tmp}/o", "--tokenizer", "{tmp}"], "tokenizer.json"),
    "data without a tokenizer": (["train", "--out", "{tmp}/o", "--preset", "mid"], "--tokenizer"),
    "demo data missing": (["demo", "--out", "{tmp}/o", "--data", "{tmp}/none"], "none"),
    "demo data empty": (["demo", "--out", "{tmp}/o", "--data", "{empty}"], "empty"),
    "demo data short": (["demo", "--out", "{tmp}/o", "--data", "{short}"], "too short"),
    "demo out is a file": (["demo", "--out", "{short}"], "short"),
    "demo minutes": (["demo", "--out", "{tmp}/o", "--minutes", "-1"], "minutes"),
    "demo drafts": (["demo", "--out", "{tmp}/o", "--drafts", "0"], "drafts"),
    "demo tokens": (["demo", "--out", "{tmp}/o", "--tokens", "1000000000"], "tokens"),
    "demo seed": (["demo", "--out", "{tmp}/o", "--data", "{long}", "--seed", "-1"], "seed"),
    "demo where nothing can be": (["demo", "--out", "/proc/o"], "/proc"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_changes_nothing(run, checkpoint, tmp_path, case):
    files = {
        "empty": b"",
        "short": b"abc",
        "binary": b"\xff\xfe",
        "long": b"x" * (TINY.max_position_embeddings + 1),
    }
    places = {"tmp": tmp_path, "model": checkpoint}
    for name, data in files.items():
        places[name] = tmp_path / f"{name}.txt"
        places[name].write_bytes(data)
    before = listing(tmp_path)
    arguments, reason = BAD[case]
    code, out, err = run(*(a.format(**places) for a in arguments))
    assert code == 2 and not out, err
    assert reason in err and err.count("\n") == 1 and "Traceback" not in err
    assert listing(tmp_path) == before


def test_vocabulary_that_does_not_fit(run, tmp_path, text):
    config = dataclasses.replace(
        TINY, vocab_size=200, bos_token_id=None, eos_token_ids=(), pad_token_id=None
    )
    random_model(config).save_pretrained(tmp_path / "m")
    byte_tokenizer().save(str(tmp_path / "m" / "tokenizer.json"))
    for arguments in (
        ["generate", tmp_path / "m", "--prompt", "x"],
        ["train", "--out", tmp_path / "o", "--model", tmp_path / "m", "--data", text],
    ):
        code, _, err = run(*arguments)
        assert code == 2 and "vocabulary only 200" in err and err.count("\n") == 1


def test_full_disk_on_save_loses_nothing(run, text, tmp_path):
    """A limit on file size stands in for a full disk: the write fails in the same place."""
    out = tmp_path / "run"
    common = ["--out", out, "--data", text, "--batch-size", 1, "--sequence-length", 16]
    assert run("train", *common, "--steps", 1)[0] == 0
    before = listing(out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        code, _, err = run("train", *common, "--steps", 2, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and err.count("\n") == 1 and "safetensors" in err
    assert listing(out) == before
    assert run("train", *common, "--steps", 2, "--resume")[0] == 0


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kexaone", "info", "giant", "--debug"])
    with pytest.raises(ValueError, match="neither a preset"):
        main()


def test_no_arguments_show_help(run):
    code, out, _ = run()
    assert code == 0 and "demo" in out and "generate" in out


@pytest.mark.parametrize("command", ["generate {} --prompt abc", "info", "--help"])
def test_output_that_is_closed_early_is_one_line(checkpoint, command):
    """As in `kexaone generate ... | head -c 1`, where the reader is gone at once."""
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [sys.executable, "-m", "kexaone", *command.format(checkpoint).split()]
    done = subprocess.run(arguments, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (2, "error: the output was closed before its end\n")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory on the device"),
    ],
)
def test_a_machine_that_is_too_small_is_one_line(run, checkpoint, monkeypatch, error, words):
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(generation, "generate", refuse)
    assert run("generate", checkpoint, "--prompt", "a") == (2, "", f"error: {words}\n")


def test_a_fault_of_the_program_is_not_called_bad_input(run, checkpoint, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(generation, "generate", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        run("generate", checkpoint, "--prompt", "a")


def test_interrupted_training_keeps_its_checkpoints(run, text, tmp_path, monkeypatch):
    common = ["--out", tmp_path / "o", "--data", text, "--batch-size", 1, "--sequence-length", 16]
    assert run("train", *common, "--steps", 1)[0] == 0
    before = listing(tmp_path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupt)
        code, _, err = run("train", *common, "--steps", 2, "--resume")
    assert (code, err) == (130, "interrupted\n")
    assert listing(tmp_path) == before
    assert run("train", *common, "--steps", 2, "--resume")[0] == 0
