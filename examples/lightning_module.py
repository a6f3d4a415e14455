"""The cached step in a Lightning module, by manual optimisation. Without `pip install lightning` this stops.

For one device. Lightning's DDP strategy wraps the module around `training_step`, so the several backward passes inside
it would each reduce; on several devices use Accelerate or torchrun (accelerate_loop.py).
"""

import importlib.util
import logging
import sys
import tempfile

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from anybatch import InfoNCE, cached_step
from anybatch.caching import StepMemory

if importlib.util.find_spec("lightning") is None:
    print("lightning is not installed: nothing was run.")
    sys.exit(0)

import lightning

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Contrastive(lightning.LightningModule):
    """Two towers with shared weights and a learned temperature."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False  # the cached step makes its own backward passes
        self.encoder = nn.Sequential(nn.EmbeddingBag(5_000, 128), nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64))
        self.loss = InfoNCE(temperature=0.05, learnable_temperature=True)
        self.memory = StepMemory("80%")

    def training_step(self, batch):
        """One optimiser step."""
        optimizer = self.optimizers()
        optimizer.zero_grad()
        value = cached_step(
            self.loss, self.encoder, list(batch), mini_batch_size="auto", keep_graphs="auto", memory=self.memory
        )
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()
        print(f"loss {value.item():.3f}, temperature {self.loss.temperature:.4f}")

    def configure_optimizers(self):
        """The encoder and the temperature."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


torch.manual_seed(0)
anchors = torch.randint(5_000, (2_048, 12))
positives = torch.where(torch.rand(2_048, 12) < 0.5, anchors, torch.randint(5_000, (2_048, 12)))
loader = DataLoader(TensorDataset(anchors, positives), batch_size=512, shuffle=True, drop_last=True)
with tempfile.TemporaryDirectory() as folder:
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Contrastive(), loader)
