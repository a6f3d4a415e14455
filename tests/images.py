"""Tiny images, and a tiny model for images and texts, made on the spot."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

COLOURS = {"red": (200, 30, 30), "green": (20, 160, 60), "blue": (30, 60, 200), "black": (0, 0, 0), "white": (255,) * 3}
SHAPES = ("bar", "square", "frame", "dot")


def image(number: int) -> bytes:
    """A PNG: a shape of one colour at a place of its own, 20 x 20 or 24 x 16 pixels."""
    from PIL import Image, ImageDraw

    size = (20, 20) if number % 2 else (24, 16)
    drawing = Image.new("RGB", size, (230, 220, 200))
    place = 1 + number % 7
    box = (place, place, place + (12 if number % 4 == 0 else 6), place + 6)
    ImageDraw.Draw(drawing).rectangle(
        box, fill=list(COLOURS.values())[number % 5], outline=(number, 2 * number, 3 * number)
    )
    file = BytesIO()
    drawing.save(file, "PNG")
    return file.getvalue()


def caption(number: int) -> str:
    """What `image(number)` shows."""
    return f"a {list(COLOURS)[number % 5]} {SHAPES[number % 4]} at place {number % 7}"


def save_pairs(folder: Path, numbers: list[int], *, anchor: str = "image", positive: str = "caption") -> Path:
    """A data set of images and captions, as `datasets` saves it."""
    from datasets import Dataset, Features, Image, Value

    rows = {
        anchor: [{"bytes": image(number), "path": None} for number in numbers],
        positive: [caption(number) for number in numbers],
    }
    features = Features({anchor: Image(), positive: Value("string")})
    Dataset.from_dict(rows, features=features).save_to_disk(str(folder))
    return folder


def save_clip(folder: Path) -> Path:
    """A sentence-transformers model folder: CLIP of one layer and width 16 a tower, random weights, word-level
    tokenizer.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Transformer
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    special = ["[PAD]", "[UNK]", "[BOS]", "[EOS]"]
    words = [*special, "a", "at", "place", *COLOURS, *SHAPES, *map(str, range(10))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)])  # pyright: ignore
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        model_max_length=16,
    )
    width = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={
            **width,
            "vocab_size": len(words),
            "max_position_embeddings": 16,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        vision_config={**width, "image_size": 16, "patch_size": 8, "attention_dropout": 0.1},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder / "clip")
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPProcessor(CLIPImageProcessorPil(**sizes), fast).save_pretrained(folder / "clip")
    SentenceTransformer(modules=[Transformer(str(folder / "clip"))], device="cpu").save_pretrained(
        str(folder / "model")
    )
    return folder / "model"
