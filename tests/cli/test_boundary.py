"""The one place where errors become messages and exit codes: 0, 2 with one message, 130 and 143 with a line, 1 with a
traceback for a bug of ours.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import TrainerControl

from anybatch import cli
from anybatch.core.errors import AnybatchError
from anybatch.integrations.sentence_transformers.recorder import StopAfterStep

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def main(monkeypatch, capfd):
    """Run the command in this process; returns its exit code and what it printed."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["anybatch", *map(str, arguments)])
        before = [signal.getsignal(number) for number in SIGNALS]
        try:
            with pytest.raises(SystemExit) as done:
                cli.main()
        finally:
            for number, handler in zip(SIGNALS, before, strict=True):
                signal.signal(number, handler)
        printed = capfd.readouterr()
        return int(done.value.code or 0), printed.out + printed.err

    return run


def anybatch(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "anybatch", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def damage_pickle(folder: Path) -> None:
    """Weights as a pickle that is none."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04 no weights")


def malicious_pickle(folder: Path) -> None:
    """Weights as a pickle of an object that only an unsafe reader would load."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Path("x")}))


def cut(name: str):
    """Half of a file."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


def overwrite(name: str, content: str):
    """Another content."""

    def damage(folder: Path) -> None:
        (folder / name).write_text(content)

    return damage


MODELS = {
    "weights cut short": cut("model.safetensors"),
    "weights empty": overwrite("model.safetensors", ""),
    "weights of a pickle that is none": damage_pickle,
    "weights of a pickle that is refused": malicious_pickle,
    "configuration cut short": cut("config.json"),
    "configuration empty": overwrite("config.json", ""),
    "configuration a list": overwrite("config.json", "[]"),
    "modules of nothing": overwrite("modules.json", "[]"),
    "modules unknown": overwrite("modules.json", '[{"idx": 0, "name": "0", "path": "", "type": "no.such.Module"}]'),
    "modules not UTF-8": lambda folder: (folder / "modules.json").write_bytes(b"\xff\xfe["),
    "tokenizer cut short": cut("tokenizer.json"),
    "tokenizer missing": lambda folder: (folder / "tokenizer.json").unlink(),
    "no files": lambda folder: [path.unlink() for path in folder.rglob("*") if path.is_file()],
}


@pytest.mark.parametrize("flaw", list(MODELS))
def test_models_that_cannot_be_loaded(flaw, main, tiny_model_folder, pairs_file, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    MODELS[flaw](folder)
    code, said = main("evaluate", folder, "--data", pairs_file)
    assert (code, "Traceback" in said) == (2, False), said
    assert str(folder) in said


def test_devices_that_are_not_there(main, tiny_model_folder, pairs_file, tmp_path):
    given = (
        "train",
        "--data",
        pairs_file,
        "--model",
        tiny_model_folder,
        "--batch-size",
        8,
        "--output",
        tmp_path / "out",
    )
    for device in ("cuda", "mps", "gpu", "cuda:99", "tpu"):
        if device == "cuda" and torch.cuda.is_available():
            continue
        code, said = main(*given, "--set", "mining.method=random", "--set", f"model.device={device}")
        assert (code, "Traceback" in said) == (2, False), said
        assert "model.device" in said
    assert not (tmp_path / "out").exists()


def files(tmp_path: Path, name: str, content: bytes) -> Path:
    """A file of this content."""
    path = tmp_path / name
    path.write_bytes(content)
    return path


def mistakes(tmp_path: Path, model: Path, pairs: Path) -> dict[str, list[object]]:
    """Command lines with one mistake each."""

    def train_on(data: Path) -> list[object]:
        return ["train", "--data", data, "--model", model, "--output", tmp_path / "out"]

    train = ["train", "--data", pairs, "--model", model, "--batch-size", 8, "--set", "mining.method=random"]
    mine = ["mine", "--data", pairs, "--batch-size", 8, "--output", tmp_path / "out"]
    npy = tmp_path / "vectors.npy"
    np.save(npy, np.ones((97, 4), complex))
    a_file = files(tmp_path, "file", b"here")
    vectors = ["--set", f"teacher.embeddings=[{npy}, {npy}]"]
    return {
        "nothing": [],
        "unknown verb": ["trian"],
        "unknown option": ["train", "--epoch", 3],
        "option without value": ["train", "--set"],
        "no number": ["train", "--batch-size", "many"],
        "no data": ["train", "--output", tmp_path / "out", "--model", model],
        "config is a folder": ["train", "--config", tmp_path],
        "config not UTF-8": ["train", "--config", files(tmp_path, "a.yaml", b"\xff\xfe")],
        "config no YAML": ["train", "--config", files(tmp_path, "b.yaml", b"a: [")],
        "config with a tag": ["train", "--config", files(tmp_path, "c.yaml", b"a: !!python/object:os.system x")],
        "config nested deeply": ["train", "--config", files(tmp_path, "d.yaml", b"[" * 5000)],
        "config no such date": ["train", "--config", files(tmp_path, "f.yaml", b"output: 2020-13-01")],
        "set nested deeply": ["train", "--set", "a=" + "[" * 5000],
        "config a date": ["train", "--config", files(tmp_path, "e.yaml", b"output: 2020-01-01\ndata: {path: x}")],
        "set no YAML": [*train, "--output", tmp_path / "out", "--set", "train.epochs=["],
        "set unknown": [*train, "--output", tmp_path / "out", "--set", "train.epoch=1"],
        "set a section": [*train, "--output", tmp_path / "out", "--set", "train=1"],
        "set nan": [*train, "--output", tmp_path / "out", "--set", "mining.conflict_weight=.nan"],
        "data a folder without data": train_on(tmp_path / "empty"),
        "data not UTF-8": train_on(files(tmp_path, "a.jsonl", b'{"anchor": "\xff"}')),
        "data no JSON": train_on(files(tmp_path, "b.jsonl", b"{")),
        "data no gzip": train_on(files(tmp_path, "c.jsonl.gz", b"no")),
        "data gzip cut short": train_on(files(tmp_path, "d.jsonl.gz", gzip.compress(pairs.read_bytes())[:-9])),
        "data no Parquet": train_on(files(tmp_path, "e.parquet", b"no")),
        "output a file": [*train, "--output", a_file],
        "output in a file": [*train, "--output", a_file / "run"],
        "output too long": [*train, "--output", tmp_path / ("x" * 300)],
        "output not UTF-8": [*train, "--output", f"{tmp_path}/\udcff"],
        "output of nothing": [*train, "--output", ""],
        "output a device": [*train, "--output", "/dev/null/run"],
        "no teacher": [*mine, "--set", "mining.method=anybatch"],
        "embeddings complex": [*mine, *vectors, "--set", "mining.cluster_size=4"],
        "resume nothing": ["train", "--resume", "--output", tmp_path / "nothing"],
        "plan missing": [*train, "--output", tmp_path / "out", "--plan", tmp_path / "no.safetensors"],
        "plan a folder": [*train, "--output", tmp_path / "out", "--plan", tmp_path],
        "plan no plan": [*train, "--output", tmp_path / "out", "--plan", files(tmp_path, "p.safetensors", b"no")],
        "inspect nothing": ["inspect", "plan", tmp_path / "nothing"],
        "inspect no report": ["inspect", "plan", a_file, "--html", tmp_path / "x" / "y.html"],
        "gradient of nothing": ["inspect", "gradient", "--data", tmp_path / "nothing.jsonl"],
        "evaluate nothing": ["evaluate", tmp_path / "no-model", "--data", pairs],
        "evaluate to a folder": ["evaluate", model, "--data", pairs, "--output", tmp_path],
        "evaluate no rows": ["evaluate", model, "--data", pairs, "--limit", 0],
        "evaluate no tokens": ["evaluate", model, "--data", pairs, "--max-length", 0],
        "doctor no rows": ["doctor", "--data", pairs, "--model", model, "--rows", 0],
        "doctor fewer than no rows": ["doctor", "--data", pairs, "--model", model, "--rows", -3],
        "demo in a file": ["demo", "--output", a_file],
    }


def test_waiting_threads_sleep_unless_the_user_says_otherwise(main, monkeypatch):
    """Spinning threads made the demo five times slower on a machine with other work; torch reads this when loaded."""
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert main("--help")[0] == 0
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert main("--help")[0] == 0
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    code = "import sys, anybatch.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_mistakes_end_with_code_2_and_one_message(main, tiny_model_folder, pairs_file, tmp_path):
    (tmp_path / "empty").mkdir()
    wrong = {}
    for name, arguments in mistakes(tmp_path, tiny_model_folder, pairs_file).items():
        code, said = main(*arguments)
        if code != 2 or "Traceback" in said or "report it" in said or not said.strip():
            wrong[name] = (code, said[-500:])
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert wrong == {}, wrong


@pytest.mark.parametrize(
    ("verb", "option", "led_to"),
    [
        ("train", "--lr", "(Possible options: --learning-rate)"),
        ("mine", "--batch", "(Possible options: --batch-size)"),
        ("evaluate", "--out", "(Possible options: --output)"),
        ("recommend", "--epoch", "(Possible options: --epochs)"),
        ("train", "--temperature", "(Possible options: --set loss.temperature=X)"),
        ("doctor", "--lr", "No such option: --lr ("),  # which it has not: what looks like it
    ],
)
def test_usual_names_lead_to_our_options(verb, option, led_to, main):
    code, said = main(verb, option, 3)
    assert (code, led_to in said) == (2, True), said
    assert ("learning-rate" in said) == ((verb, option) == ("train", "--lr"))


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (AnybatchError("Give a file."), 2, "anybatch: Give a file."),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a/b"), 2, "No such file or directory: /a/b"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 2, "Permission denied: /a/b"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
        (UnicodeDecodeError("utf-8", b"a", 0, 1, "invalid start byte"), 2, "invalid start byte"),
        (EOFError("cut short"), 2, "cut short"),
        (pickle.UnpicklingError("weights_only"), 2, "weights_only"),
        (gzip.BadGzipFile("no gzip"), 2, "no gzip"),
        (yaml.YAMLError("line 3"), 2, "line 3"),
        (json.JSONDecodeError("Expecting value", "x", 0), 2, "Expecting value"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 2, "went away"),
        (MemoryError(), 2, "Memory ran out"),
        (np._core._exceptions._ArrayMemoryError((10**9,), np.dtype("f8")), 2, "Memory ran out"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"),
            2,
            "Memory ran out: CUDA out of memory",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 2, "Memory ran out"),
        (AssertionError("Torch not compiled with CUDA enabled"), 2, "model.device"),
        (RuntimeError("No CUDA GPUs are available"), 2, "model.device"),
        (ModuleNotFoundError("No module named 'PIL'", name="PIL"), 2, "pip install 'anybatch[vision]'"),
        (ModuleNotFoundError("No module named 'einops'", name="einops.layers"), 2, "pip install einops"),
        (
            KeyboardInterrupt(),
            130,
            "stopped by Ctrl-C; finished work is kept, of training the last checkpoint",
        ),
        (cli.Stopped(signal.SIGTERM), 143, "stopped by SIGTERM; finished work is kept"),
        (KeyError("cluster"), 1, "Please report it"),
        (IndexError("list index out of range"), 1, "Please report it"),
        (ModuleNotFoundError("No module named 'anybatch.x'", name="anybatch.x"), 1, "Please report it"),
        (AssertionError(), 1, "Please report it"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_wherever_they_arise(error, code, said, main, monkeypatch):
    """A verb that raises the error: what a library or the system says, and true bugs, which keep their traceback."""
    from anybatch.run import job

    def fail(*arguments, **settings):
        raise error

    monkeypatch.setattr(job, "train", fail)
    got, printed = main("train", "--data", "d", "--output", "o")
    assert got == code
    assert said in printed
    assert ("Traceback" in printed) == (code == 1)
    assert printed.count("anybatch: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_signals_leave_a_checkpoint(number, pairs_file, tiny_model_folder, tmp_path):
    """In the middle of training, in a process of its own; the resumed run is the uninterrupted one, bit for bit."""

    def train(name, *more):
        given = ["--data", pairs_file, "--model", tiny_model_folder, "--output", tmp_path / name, "--batch-size", 8]
        values = ["mining.method=random", "train.epochs=40", "model.device=cpu", "train.args.logging_steps=1"]
        return anybatch("train", *given, *(item for value in values for item in ("--set", value)), *more)

    process, log = train("run"), tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 4) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert "once more stops at once" in said
    assert "Go on with the same command and --resume" in said
    assert "Traceback" not in said
    [checkpoint] = (tmp_path / "run" / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("checkpoint-")) == log.read_text().count("\n")

    _, said = (resumed := train("run", "--resume")).communicate(timeout=120)
    assert resumed.returncode == 0, said
    _, said = (whole := train("whole")).communicate(timeout=120)
    assert whole.returncode == 0, said
    first, second = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "whole"))
    assert first == second


def test_a_second_signal_stops_at_once(request):
    """The first one only asks; what is no function of Python's is left alone."""
    before, control = signal.default_int_handler, TrainerControl()
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, before)))
    request.addfinalizer(partial(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, signal.SIG_DFL)))
    with StopAfterStep() as stop:
        assert set(stop.handlers) == {signal.SIGINT}  # SIGTERM ends this process
        stop.on_step_end(None, None, control)
        assert not control.should_training_stop
        signal.raise_signal(signal.SIGINT)
        stop.on_step_end(None, None, control)
        assert control.should_save
        assert control.should_training_stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        stop.asked = None
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt), StopAfterStep():
        signal.raise_signal(signal.SIGINT)


def test_a_signal_to_the_workers_of_a_data_loader_too(request, caplog):
    """Ctrl-C reaches them, who have the handler of their parent; SIGTERM to the group ends them, which is no fault."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(partial(signal.signal, signal.SIGINT, before))
    with StopAfterStep() as stop:
        if (child := os.fork()) == 0:
            signal.raise_signal(signal.SIGINT)
            os._exit(0 if stop.asked is None and not caplog.records else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert stop.asked is None

    def fail(words):
        with StopAfterStep():
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError(words)

    with pytest.raises(KeyboardInterrupt):
        fail("DataLoader worker (pid 7) is killed by signal: Terminated.")
    with pytest.raises(RuntimeError, match="another"):
        fail("another")


@pytest.mark.parametrize("seconds", [0.3, 0.6, 0.9, 1.2, 1.5])
def test_a_signal_while_importing(seconds):
    """Imports take seconds, and are a likely moment; those of torch are of C++, which no exception may leave."""
    process = anybatch("train", "--data", "d", "--output", "o")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (130, 2), said  # 2: it was quicker, and has no such data
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("streams", "code"), [(">&-", 0), ("<&- >&- 2>&-", 0), ("2>/dev/full", 2), (">/dev/full", 2), ("2>&1 | true", None)]
)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_streams_that_are_closed_or_full(streams, code):
    wrong = (
        "evaluate /nope --data /nope.jsonl"
        if "2>/" in streams or "|" in streams
        else "train --show-config --data d --output o"
    )
    command = f"{sys.executable} -m anybatch {wrong} {streams}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == (2 if code is None else code), done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_a_reader_that_goes_away():
    """`anybatch train --show-config | head -1`"""
    process = anybatch("train", "--show-config", "--data", "d", "--output", "o")
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 2
    assert "went away" in said
    assert "Exception ignored" not in said


@pytest.mark.distributed
def test_under_torchrun_one_rank_speaks_and_all_end(pairs_file, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "anybatch"]
    done = subprocess.run(
        [*launch, "train", "--data", str(tmp_path / "no.jsonl"), "--model", "m", "--output", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("anybatch: There is no file") == 1, done.stderr
    assert "exitcode  : 2" in done.stderr


@pytest.mark.slow
def test_numbers_of_options(main, tiny_model_folder, pairs_file, tmp_path):
    """Every option that takes a number, of every verb, with numbers that make no sense: done or refused, never a
    traceback.
    """
    vectors = np.random.default_rng(0).normal(size=(97, 8)).astype(np.float32)
    sides = [tmp_path / f"{side}.npy" for side in ("anchor", "positive")]
    for path in sides:
        np.save(path, vectors)
    given = [f"teacher.embeddings=[{sides[0]}, {sides[1]}]", "mining.cluster_size=4", "mining.window=[1, 6]"]
    run = tmp_path / "run"
    sets = [item for value in given for item in ("--set", value)]
    assert main("mine", "--data", pairs_file, "--batch-size", 8, "--output", run, *sets)[0] == 0
    training = ("--data", pairs_file, "--model", tiny_model_folder)
    usual = {
        "evaluate": [tiny_model_folder, "--data", pairs_file],
        "doctor": [*training, "--rows", 4],
        "train": [*training, "--show-config", "--output", "unused"],
        "mine": ["--data", pairs_file, "--set", "mining.method=random", "--output", tmp_path / "mined"],
        "inspect plan": [run],
        "inspect gradient": [run],
    }
    wrong, tried = {}, 0
    for name in usual:
        help_page = main(*name.split(), "--help")[1]
        for option in re.findall(r"(--[a-z-]+) +<?(?:int|float)", help_page, re.IGNORECASE):
            for value in ("nan", "inf", "-1", "0", "-0.0", "1e400", str(10**20), "x", ""):
                code, said = main(*name.split(), *usual[name], option, value)
                shutil.rmtree(tmp_path / "mined", ignore_errors=True)
                tried += 1
                if code not in (0, 2) or "Traceback" in said:
                    wrong[f"{name} {option} {value}"] = (code, said[-400:])
    assert wrong == {}, wrong
    assert tried > 80
