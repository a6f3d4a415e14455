"""The code and the commands of docs/images.md are executed, on 40 images with a tiny model."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

from anybatch.plans.plan import BatchPlan
from tests.cli.test_cli import run
from tests.images import caption, image, save_clip

PAGE = Path(__file__).parents[2] / "docs" / "images.md"
SMALLER = [
    "mining.method=anybatch",
    "mining.cluster_size=4",
    "mining.window=[2, 8]",
    "model.device=cpu",
    "train.learning_rate=0.001",
]


def test_page(tmp_path, monkeypatch):
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(code, names)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    files = []
    for number in range(40):
        files.append(str(tmp_path / "files" / f"{number}.png"))
        Path(files[-1]).write_bytes(image(number))
    captions = [caption(number) for number in range(40)]
    names["save_pairs"](files[:32], captions[:32], "pairs")
    names["save_pairs"](files[32:], captions[32:], "held_out")
    shutil.rmtree("files")  # the folder holds the bytes
    save_clip(tmp_path / "clip")
    (commands,) = re.findall(r"```sh\n(anybatch mine.*?)```", text, re.DOTALL)
    lines = commands.replace("\\\n", " ").replace("sentence-transformers/clip-ViT-B-32", "clip/model").splitlines()
    assert [shlex.split(line)[1] for line in lines] == ["mine", "inspect", "train", "evaluate"]
    for line in lines:
        arguments = shlex.split(line.replace("--batch-size 256", "--batch-size 8"))[1:]
        if "--batch-size" in arguments:
            arguments += [item for value in SMALLER for item in ("--set", value)]
        run(*arguments)
    assert BatchPlan.load(tmp_path / "runs" / "mined" / "plan.safetensors").num_rows == 32
    assert "<img" in (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert (tmp_path / "runs" / "trained" / "metrics.json").exists()
