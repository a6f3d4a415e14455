"""Shared fixtures: a real but tiny transformer built in memory, and small pair files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

# Tiny models on two threads spend their time waiting for each other: five times slower than on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

WORDS = [
    f"{stem}{ending}"
    for stem in ("mat", "gra", "nod", "bat", "sof", "ten", "rul", "plan")
    for ending in ("a", "o", "is", "er", "ing", "ed")
]


def sentence(number: int, length: int) -> str:
    """A deterministic made-up sentence."""
    return " ".join(WORDS[(number * 7 + position * (3 + number % 5)) % len(WORDS)] for position in range(length))


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_tiny_model`."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def make_tiny_model(folder: Path) -> Path:
    """A sentence-transformers model folder: two BERT layers of width 32, random weights, dropout on, word-level
    tokenizer.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])  # pyright: ignore
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder / "bert")
    fast.save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"), max_seq_length=24)
    SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu").save_pretrained(str(folder / "model"))
    return folder / "model"


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """See `write_pairs`."""
    return write_pairs(tmp_path / "pairs.jsonl")


def write_pairs(path: Path) -> Path:
    """97 pairs, ragged lengths, some anchors and positives repeated."""
    with path.open("w") as file:
        for row in range(97):
            number = row % 90  # rows 90..96 repeat the anchors of rows 0..6
            positive = row if row not in (20, 21) else 19  # rows 19, 20 and 21 share a positive
            file.write(
                json.dumps(
                    {
                        "anchor": sentence(number, 2 + number % 5),
                        "positive": sentence(positive, 3 + positive % 9) + f" {WORDS[positive % 48]}",
                    }
                )
                + "\n"
            )
    return path
