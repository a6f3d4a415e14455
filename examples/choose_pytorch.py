"""Choose the batch: let a teacher decide who sits together, in plain PyTorch.

The teacher here is TF-IDF reduced by a random projection, so that the example runs anywhere in seconds; any (n, d)
arrays do.
"""

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from anybatch import BatchPlan, MiningConfig, PlanSampler, mine_plan, sample

pairs = sample.load("train", limit=1024)
vectorizer = TfidfVectorizer(stop_words="english").fit([*pairs.anchors, *pairs.positives])
projection = np.random.default_rng(0).normal(size=(len(vectorizer.vocabulary_), 256)) / 16
teacher_anchors = vectorizer.transform(pairs.anchors) @ projection
teacher_positives = vectorizer.transform(pairs.positives) @ projection

# The lever itself: teacher embeddings in, batches out.
result = mine_plan(
    teacher_anchors.astype(np.float32),
    teacher_positives.astype(np.float32),
    config=MiningConfig(batch_size=64, cluster_size=16, window=(2, 32)),
    anchor_id=pairs.anchor_id,
    positive_id=pairs.positive_id,
    data_digest=pairs.digest,
)
result.plan.save("plan.safetensors")

# Later, perhaps on another machine: a plan is a PyTorch batch sampler.
plan = BatchPlan.load("plan.safetensors")
plan.check(num_rows=len(pairs), data_digest=pairs.digest)
sampler = PlanSampler(plan)
loader = torch.utils.data.DataLoader(range(len(pairs)), batch_sampler=sampler)
for epoch in range(2):
    sampler.set_epoch(epoch)  # the clusters stay, their combination changes
    rows = next(iter(loader))
    print(f"epoch {epoch}: {len(loader)} batches; the first begins with")
    for row in rows[:4].tolist():
        print("   ", pairs.anchors[row])
