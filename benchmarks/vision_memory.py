"""Peak memory against batch size for images: `python -m benchmarks.vision memory`, some minutes on two cores.

One step of a tiny CLIP on pairs of an image (JPEG, 224 x 224) and a caption, mini-batches of 32, as a Trainer makes
it: rows through the collator, the loss, its backward pass. Every point is a process of its own; what is shown is the
peak of its resident memory above what it was after a first small step. Writes docs/benchmarks/vision_memory.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from anybatch.core.files import write_text

SIZE = 224
DIFFERENT = 64  # pictures
MINI_BATCH = 32
WAYS = {
    "on demand": "anybatch, decoded per mini-batch",
    "whole": "anybatch, decoded per batch",
    "peer": "sentence-transformers' cached loss",
}
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "vision_memory.md"


def make_model(folder: Path) -> Any:
    """A CLIP of one layer and width 64 a tower that reads 224 x 224 pixels, from random weights."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Transformer
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = ["<pad>", "<unk>", "<end>", "picture", *map(str, range(DIFFERENT))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", model_max_length=16
    )
    width = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 16, "pad_token_id": 0, "eos_token_id": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=width | text, vision_config=width | {"image_size": SIZE, "patch_size": 32}, projection_dim=64
    )
    CLIPModel(config).save_pretrained(folder)
    sizes: dict[str, Any] = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    CLIPProcessor(CLIPImageProcessorPil(**sizes), fast).save_pretrained(folder)
    return SentenceTransformer(modules=[Transformer(str(folder))], device="cpu")


def make_rows(count: int) -> list[dict[str, Any]]:
    """Images as a data set stores them, and captions."""
    import numpy as np
    from PIL import Image

    generator, files = np.random.default_rng(0), []
    for _ in range(DIFFERENT):
        file = BytesIO()
        coarse = Image.fromarray(generator.integers(0, 255, (14, 14, 3), dtype=np.uint8))
        coarse.resize((SIZE, SIZE)).save(file, "JPEG")
        files.append(file.getvalue())
    numbers = [number % DIFFERENT for number in range(count)]
    return [{"image": {"bytes": files[n], "path": None}, "caption": f"picture {n}"} for n in numbers]


def decoded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as a data set hands them out: images decoded."""
    from PIL import Image

    images = [Image.open(BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
    return [{**row, "image": image} for row, image in zip(rows, images, strict=True)]


def measure(way: str, count: int) -> dict[str, float]:
    """MiB and seconds of one step, in this process."""
    import resource

    import psutil
    import torch
    from sentence_transformers.base.data_collator import BaseDataCollator
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    from anybatch import InfoNCE
    from anybatch.integrations.sentence_transformers import CachedLoss
    from anybatch.integrations.sentence_transformers.collating import ImageCollator

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder)).train()
    collate: Any = BaseDataCollator(preprocess_fn=model.preprocess)
    collate = ImageCollator(collate) if way == "on demand" else collate
    loss: Any = CachedLoss(model, InfoNCE(temperature=0.05), mini_batch_size=MINI_BATCH, keep_graphs=0.0)
    if way == "peer":
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=MINI_BATCH)
    rows = make_rows(count)

    def step(part: list[dict[str, Any]]) -> None:
        batch = collate(part if way == "on demand" else decoded(part))
        columns = [
            {key.removeprefix(f"{name}_"): value for key, value in batch.items() if key.startswith(f"{name}_")}
            for name in ("image", "caption")
        ]
        loss(columns, None).backward()

    step(rows[: 2 * MINI_BATCH])
    start, begun = psutil.Process(os.getpid()).memory_info().rss, time.perf_counter()
    step(rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"mib": max(0.0, peak - start) / 2**20, "seconds": time.perf_counter() - begun}


def write_page(figures: dict[str, dict[int, dict[str, float]]]) -> None:
    """The table."""
    sizes = list(next(iter(figures.values())))
    lines = [
        "# Memory of a batch of images",
        "",
        "`python -m benchmarks.vision memory` on a 2-core x86 CPU, one thread. One step of a tiny CLIP on pairs of",
        f"an image ({SIZE} x {SIZE}, JPEG) and a caption, mini-batches of {MINI_BATCH}, every graph replayed; each",
        "point is a process of its own. Peak of resident memory above what it was before the step, in MiB:",
        "",
        "| batch | pixels alone (float32) | " + " | ".join(WAYS[way] for way in figures) + " |",
        "|--:|--:|" + "--:|" * len(figures),
    ]
    for size in sizes:
        pixels = size * 3 * SIZE * SIZE * 4 / 2**20
        cells = " | ".join(f"{figures[way][size]['mib']:,.0f}" for way in figures)
        lines.append(f"| {size:,} | {pixels:,.0f} | {cells} |")
    lines += ["", "Seconds of the step, decoding included:", ""]
    lines += ["| batch | " + " | ".join(WAYS[way] for way in figures) + " |", "|--:|" + "--:|" * len(figures)]
    for size in sizes:
        lines.append(f"| {size:,} | " + " | ".join(f"{figures[way][size]['seconds']:.1f}" for way in figures) + " |")
    lines += [
        "",
        "Decoded per mini-batch, an image is decoded twice, for the recording and for its replay; a kept graph needs",
        "no second time. A thread decodes the next mini-batch meanwhile. This encoder is so small that decoding is",
        "nearly all of the time. The seconds are rough: other work shared the machine.",
        "",
    ]
    write_text(PAGE, "\n".join(lines))


def main(arguments: Sequence[str] | None = None) -> None:
    """All points, or one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--point", nargs=2, metavar=("WAY", "SIZE"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.point:
        print(json.dumps(measure(chosen.point[0], int(chosen.point[1]))))
        return
    figures: dict[str, dict[int, dict[str, float]]] = {}
    for way in WAYS:
        for size in chosen.sizes:
            command = [sys.executable, "-m", "benchmarks.vision_memory", "--point", way, str(size)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            figures.setdefault(way, {})[size] = json.loads(done.stdout.splitlines()[-1])
            print(way, size, figures[way][size], flush=True)
    write_page(figures)


if __name__ == "__main__":
    main()
