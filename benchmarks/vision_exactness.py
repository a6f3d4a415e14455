"""How far the cached step is from the plain step for images: `python -m benchmarks.vision exactness`, some minutes.

Tiny models from configuration, one of each way in which pixels lie in a batch, in float64: the relative error of the
gradient against the plain step (one graph over the whole batch; with dropout, over its mini-batches). Images decoded
per mini-batch. Writes docs/benchmarks/vision_exactness.md. Run it from the repository: the models are those of
tests/vision_models.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anybatch.core.files import write_text

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "vision_exactness.md"
WAYS = ("plain", "lora", "dropout", "checkpointing")
NAMES = {
    "clip": "CLIP",
    "siglip": "SigLIP",
    "vit": "ViT, two images",
    "qwen2vl": "Qwen2-VL",
    "qwen3vl": "Qwen3-VL",
    "llava": "LLaVA",
    "gemma3": "Gemma 3",
    "idefics3": "Idefics3",
}
FORMS = {"text": "text", "image": "image", "both": "both", "several": "0 to 3 images", "mixed": "all of these"}


def errors(kind: str, form: str) -> dict[str, float]:
    """Of the gradient, one for each way, for two ranks with graphs, and for the peer."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from tests import vision_models as vision
    from tests.caching.helpers import relative_error
    from tests.integrations import test_vision as parts

    found: dict[str, float] = {}
    for way in WAYS:
        options: dict[str, Any] = {"dropout": 0.2} if way == "dropout" else {way: True} if way != "plain" else {}
        model, columns = vision.load(kind, **options), parts.columns_of(kind, form)
        features = parts.features_of(model, columns)
        trim = "none" if kind == "siglip" else "trailing"
        _, wanted = parts.plain(model, features, mini_batch_size=3 if way == "dropout" else None, trim=trim)
        given = features if form == "text" else [parts.undecoded(columns[0]), features[1]]
        for keep in (0.0, 0.5):
            _, got = parts.cached(model, given, mini_batch_size=3, keep_graphs=keep)
            found[way] = max(found.get(way, 0.0), relative_error(got, wanted))
        if way == "plain":
            _, peers = parts.stepped(model, features, CachedMultipleNegativesRankingLoss(model, mini_batch_size=3))
            found["peer"] = relative_error(peers, wanted)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """All cases, and the page."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    import torch
    from tests import vision_models as vision
    from tests.integrations import test_vision as parts
    from tests.ranks import on_ranks

    torch.set_num_threads(1)
    folders = {kind: vision.folder_of(kind) for kind in parts.OF_RANKS}
    by_rank = on_ranks(parts._of_ranks, 2, folders)
    lines = [
        "# Exactness with images",
        "",
        "`python -m benchmarks.vision exactness` on a 2-core x86 CPU. Tiny models from configuration, float64, 7 rows,",
        "mini-batches of 3, images decoded per mini-batch, graphs replayed and half of them kept: the largest",
        "relative error of the gradient against the plain step. Two ranks: gloo, the first with images, the second",
        "with texts alone. The last column is sentence-transformers' cached loss against the same plain step.",
        "",
        "| model | rows | plain | LoRA | dropout | checkpointing | 2 ranks | peer |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    worst = 0.0
    for kind in vision.KINDS:
        for form in vision.forms(kind):
            found = errors(kind, form)
            of_ranks = [of_rank[kind] for of_rank in by_rank if kind in of_rank and form == vision.forms(kind)[-1]]
            worst = max(worst, *(found[way] for way in WAYS), *of_ranks)
            ranks = f"{max(of_ranks):.0e}" if of_ranks else ""
            cells = [f"{found[way]:.0e}" for way in WAYS] + [ranks, f"{found['peer']:.0e}"]
            lines.append(f"| {NAMES[kind]} | {FORMS[form]} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    lines += [
        "",
        f"Largest of ours: {worst:.0e}. SigLIP reads its padding: the peer cuts it, our step finds that it may not.",
        "Gemma 3 computes its norms in float32 whatever it is given; here they are in float64, else both are at 1e-9.",
        "",
    ]
    write_text(PAGE, "\n".join(lines))


if __name__ == "__main__":
    main()
