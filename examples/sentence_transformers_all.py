"""All three levers in sentence-transformers' own Trainer: mined batches, 64 rows in the memory of 16, SogCLR's state.

Usage: python examples/sentence_transformers_all.py MODEL [PAIRS], where MODEL is a folder or a hub name.
"""

import sys

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments

from anybatch import MiningConfig, SogCLR, Trainer, mine_plan, sample
from anybatch.integrations.sentence_transformers import embed_texts

model = SentenceTransformer(sys.argv[1], device="cpu")
pairs = sample.load("train", limit=int(sys.argv[2]) if len(sys.argv) > 2 else 512)

# Choose: the untrained model is its own teacher here; a stronger one is better.
plan = mine_plan(
    embed_texts(model, pairs.anchors, side="query"),
    embed_texts(model, pairs.positives, side="document"),
    config=MiningConfig(batch_size=64, cluster_size=16, window=(2, 32)),
    anchor_id=pairs.anchor_id,
    positive_id=pairs.positive_id,
    data_digest=pairs.digest,
).plan

# Outlive: a remembered denominator per row, which the Trainer corrects for mined batches.
loss = SogCLR(num_rows=len(pairs), temperature=0.05, gamma=0.8)

# Grow: 16 rows at a time through the encoder.
args = SentenceTransformerTrainingArguments(
    output_dir="st-run",
    num_train_epochs=1,
    learning_rate=1e-4,
    logging_steps=2,
    report_to="none",
    use_cpu=True,
    dataloader_pin_memory=False,
)
trainer = Trainer(model, args, pairs.to_dataset(), loss=loss, plan=plan, mini_batch_size=16)
trainer.train()  # resume_from_checkpoint=True goes on where a killed run stopped, memory included
