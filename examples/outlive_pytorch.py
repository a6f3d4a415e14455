"""Outlive the batch: each example remembers its denominator, and batches of 32 follow the loss over all rows."""

import torch
from torch import nn

from anybatch import BatchPlan, PlanSampler, RowTable, SogCLR, sample

torch.manual_seed(0)
pairs = sample.load("train", limit=512)
vocabulary = {
    word: number
    for number, word in enumerate(sorted({word for text in pairs.positives for word in text.lower().split()}))
}


def bags(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Word numbers of all texts, one after the other, and where each text begins."""
    words = [[vocabulary.get(word, 0) for word in text.lower().split()] for text in texts]
    starts = torch.tensor([0, *[len(line) for line in words[:-1]]]).cumsum(0)
    return torch.tensor([number for line in words for number in line]), starts


encoder = nn.EmbeddingBag(len(vocabulary), 64)
optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-2)

# The lever itself: one loss with one remembered number per row; the table keeps identical texts from being negatives.
loss = SogCLR(num_rows=len(pairs), temperature=0.1, gamma=0.6)
table = RowTable(pairs.anchor_id, pairs.positive_id)

sampler = PlanSampler(BatchPlan.random(len(pairs), 32, seed=0, data_digest=pairs.digest))
for epoch in range(5):
    sampler.set_epoch(epoch)
    total = 0.0
    for rows in sampler:
        index = torch.as_tensor(rows)
        anchors = encoder(*bags([pairs.anchors[row] for row in rows]))
        positives = encoder(*bags([pairs.positives[row] for row in rows]))
        value = loss(anchors, positives, **table.arguments(index))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        total += value.item()
    print(f"epoch {epoch}: estimated objective over all rows {total / len(sampler):.3f}")

# What the loss remembers is part of its state.
torch.save({"encoder": encoder.state_dict(), "loss": loss.state_dict()}, "checkpoint.pt")
