"""Grow the batch: the exact gradient of 512 pairs, 16 rows at a time, in plain PyTorch."""

import torch
from torch import nn

from anybatch import InfoNCE, cached_step

torch.manual_seed(0)
encoder = nn.Sequential(
    nn.EmbeddingBag(5_000, 128), nn.Linear(128, 512), nn.GELU(), nn.Dropout(0.1), nn.Linear(512, 64)
)
loss = InfoNCE(temperature=0.05)
optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)

anchors = torch.randint(5_000, (512, 12))
positives = torch.where(torch.rand(512, 12) < 0.5, anchors, torch.randint(5_000, (512, 12)))

for step in range(5):
    optimizer.zero_grad()
    # The lever itself: instead of loss(encoder(anchors), encoder(positives)).backward()
    value = cached_step(loss, encoder, [anchors, positives], mini_batch_size=16)
    optimizer.step()
    print(f"step {step}: loss {value.item():.3f}")
