"""A loss with state in a Lightning module, whose checkpoint holds it. Without `pip install lightning` this stops.

The loss is a child of the module, so that Lightning saves and moves its buffers; the data set gives row numbers.
Automatic optimisation and DDP do here: the loss gathers over ranks itself, and its gradient suits the averaging of DDP.
"""

import importlib.util
import logging
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from anybatch import SogCLR

if importlib.util.find_spec("lightning") is None:
    print("lightning is not installed: nothing was run.")
    sys.exit(0)

import lightning

for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


class Contrastive(lightning.LightningModule):
    """Two towers with shared weights; every row remembers its denominator."""

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.EmbeddingBag(5_000, 128), nn.Linear(128, 64))
        self.loss = SogCLR(num_rows, gamma=0.6, temperature=0.05)

    def training_step(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The loss needs to know which rows these are."""
        index, anchors, positives = batch
        return self.loss(self.encoder(anchors), self.encoder(positives), index=index)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """All parameters, the loss's own included."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


torch.manual_seed(0)
anchors = torch.randint(5_000, (1_024, 12))
positives = torch.where(torch.rand(1_024, 12) < 0.5, anchors, torch.randint(5_000, (1_024, 12)))
# The row number is a column of the data; shuffling moves it along with its row.
data = TensorDataset(torch.arange(1_024), anchors, positives)


def fit(epochs: int, checkpoint: Path, *, resume: bool) -> Contrastive:
    """Train to `epochs`, from the beginning or from the checkpoint, and leave a checkpoint."""
    torch.manual_seed(0)
    module = Contrastive(len(data))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # no shuffling here, so that the two runs below see the same batches; a run of yours shuffles
    trainer.fit(module, DataLoader(data, batch_size=64), ckpt_path=checkpoint if resume else None)
    trainer.save_checkpoint(checkpoint)
    return module


with tempfile.TemporaryDirectory() as folder:
    whole = fit(4, Path(folder) / "whole.ckpt", resume=False)
    fit(2, Path(folder) / "parts.ckpt", resume=False)
    parts = fit(4, Path(folder) / "parts.ckpt", resume=True)
same = all(torch.equal(value, parts.state_dict()[name]) for name, value in whole.state_dict().items())
assert same, "the resumed run must be the uninterrupted one"
print(f"every row visited: {bool(whole.loss.denominator.visited.all())}; resumed equals uninterrupted: {same}")
