from __future__ import annotations

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

from anybatch.data.pairs import PairData
from benchmarks import accumulation

WORDS = [f"w{number}" for number in range(64)]


@pytest.fixture
def folder(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for seed in (0, 1):
        vectors = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))
        model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=vectors)], device="cpu")
        model.save_pretrained(str(tmp_path / str(seed)))
    return tmp_path


def gradient_of_first_step(folder, way, monkeypatch):
    """What the optimiser is given in its first step."""
    seen = []

    class Recording(torch.optim.AdamW):
        def step(self, closure=None):
            seen.append([parameter.grad.clone() for group in self.param_groups for parameter in group["params"]])

    monkeypatch.setattr(torch.optim, "AdamW", Recording)
    pairs = PairData(anchors=WORDS[:32], positives=WORDS[32:])
    model = SentenceTransformer(str(folder / "0"), device="cpu")
    accumulation.train(model, pairs, way, 0.1, seed=0, passes=1)
    return seen


def test_accumulated_steps_have_the_mean_gradient_of_their_batches(folder, monkeypatch):
    """And so not that of one large batch, which has more negatives."""
    infonce = accumulation.WAYS["batches of 64"][2]
    ways = {"small": (8, 1, infonce), "accumulated": (8, 4, infonce), "large": (32, 1, infonce)}
    monkeypatch.setattr(accumulation, "WAYS", ways)
    small, accumulated, large = (gradient_of_first_step(folder, way, monkeypatch) for way in ways)
    assert (len(small), len(accumulated), len(large)) == (4, 1, 1)
    mean = torch.stack([step[0] for step in small]).mean(dim=0)
    torch.testing.assert_close(accumulated[0][0], mean)
    assert not torch.allclose(large[0][0], mean, rtol=0.1)


def test_the_page_names_the_best_rate_and_its_test_figure():
    figures = {
        (way, rate): [(rate, 10 * rate), (rate, 10 * rate + 0.01)]
        for way, (size, batches_per_step, _) in accumulation.WAYS.items()
        for rate in accumulation.RATES[size * batches_per_step]
    }
    page, chart = accumulation.report(figures, num_pairs=2_048, passes=3)
    line = next(line for line in page.splitlines() if line.startswith("| 16 batches"))
    assert [cell.strip() for cell in line.split("|")[2:6]] == ["1,024", "6", "2.005 ± 0.005", "0.2"]
    assert "2.005" in chart
