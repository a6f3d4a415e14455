"""Is caching exact for this encoder? Take one batch both ways, and read what stands in the way."""

import random

import torch
from torch import nn

from anybatch import InfoNCE
from anybatch.insight.verify import verify

torch.manual_seed(0)
anchors = torch.randint(1_000, (32, 12))
positives = torch.randint(1_000, (32, 12))
encoder = nn.Sequential(nn.EmbeddingBag(1_000, 64), nn.Linear(64, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 32))
loss = InfoNCE(temperature=0.05, learnable_temperature=True)

sound = verify(encoder, [anchors, positives], loss, mini_batch_size=8)
print(sound)
assert sound.exact


system = random.SystemRandom()


def augmented(tokens):
    """Random numbers of the operating system cannot be drawn again; those of Python, NumPy and torch are."""
    return encoder(tokens.roll(system.randrange(3), dims=1)) * system.uniform(0.5, 1.0)


faulty = verify(augmented, [anchors, positives], loss, mini_batch_size=8)
print(faulty)
assert not faulty.exact
# For a run of the command line: anybatch doctor --config run.yaml
