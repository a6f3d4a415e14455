"""The GPU benchmark at toy size on the CPU: all of it runs, the gradients are right, and a failure is a line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

ROOT = Path(gpu.__file__).parent.parent


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        gpu.main(["--output", str(folder)])
    assert (folder / "gpu.md").read_text().startswith("# On a GPU")
    return [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


def test_every_measurement_is_made(lines):
    assert [line for line in lines[1:] if line["result"] != "done"] == []
    names = {
        stage: {line["name"] for line in lines if line["stage"] == stage} for stage in ("exactness", "loss", "step")
    }
    assert names["step"] == set(gpu.STEPS)
    assert names["exactness"] == {gpu.PLAIN, gpu.TOKENS, gpu.AUTO, gpu.PEER}
    assert {"anybatch InfoNCE", gpu.PLAIN, gpu.PEER} < names["loss"]
    assert all(line["seconds"] > 0 for line in lines if line["stage"] in ("loss", "step"))


def test_gradients_are_those_of_the_plain_step(lines):
    limits = {"float32": 1e-5, "bfloat16": 0.1}
    exact = [line for line in lines if line["stage"] == "exactness"]
    assert {line["precision"] for line in exact} == set(limits)
    for line in exact:
        assert line["to_float64"] < limits[line["precision"]]
        assert line["to_plain"] < limits[line["precision"]]


def test_every_contender_of_the_loss_stage_has_the_same_gradient():
    contenders = gpu.loss_contenders(gpu.TOY)
    sides = [torch.randn(7, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    found = {}
    for name in ("anybatch InfoNCE", gpu.PLAIN):
        leaves = [side.clone().requires_grad_() for side in sides]
        contenders[name](leaves)
        found[name] = [leaf.grad for leaf in leaves]
    torch.testing.assert_close(found["anybatch InfoNCE"], found[gpu.PLAIN], rtol=1e-4, atol=1e-6)


def test_failures_are_lines_and_are_not_repeated(tmp_path):
    report = gpu.Report(tmp_path, torch.device("cpu"), 100.0)
    calls = []

    def fails(words):
        calls.append(words)
        raise RuntimeError(words)

    for round_ in range(2):
        report.measure(lambda: fails("CUDA out of memory. Tried"), stage="step", name="a", round=round_)
        report.measure(lambda: fails("wrong shape"), stage="step", name="b", round=round_)
        report.measure(lambda: {"seconds": 1.0}, stage="step", name="c", round=round_)
    assert [line["result"] for line in report.lines] == ["out of memory", "RuntimeError: wrong shape", "done", "done"]
    assert len(calls) == 2
    late = gpu.Report(tmp_path, torch.device("cpu"), 0.0)
    late.measure(lambda: fails("too late"), stage="step", name="a")
    assert [line["result"] for line in late.lines] == ["no time"]
    assert len(calls) == 2


def test_nothing_but_torch_is_needed():
    """What a machine lent for a benchmark may lack is not imported by what is measured there."""
    absent = [
        "numba",
        "pymetis",
        "datasets",
        "transformers",
        "sentence_transformers",
        "safetensors",
        "typer",
        "rich",
        "yaml",
        "scipy",
        "pyarrow",
    ]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "import torch\n"
        "from benchmarks import gpu\n"
        "device = torch.device('cpu')\n"
        "model = torch.nn.Sequential(gpu.Encoder('toy', device, dropout=0.0))\n"
        "batch = gpu.batch_of(9, gpu.TOY, device)\n"
        "one, two = (gpu.gradient(model, gpu.step_of(name, model, batch, torch.float32, 4)) for name in (gpu.PLAIN, "
        "gpu.AUTO))\n"
        "print(float((one - two).norm() / one.norm()), gpu.versions())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) < 1e-5
