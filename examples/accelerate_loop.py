"""A plain Accelerate loop with the cached step: the batch is as large as you like, the memory is a budget.

Run it with `python`, or on several processes with `accelerate launch` or `torchrun`: each rank gives its share of the
batch, and the gradients are those of one process with the whole of it.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from anybatch import InfoNCE, cached_step
from anybatch.caching import StepMemory

torch.manual_seed(0)
accelerator = Accelerator(cpu=not torch.cuda.is_available())
encoder = nn.Sequential(
    nn.EmbeddingBag(5_000, 128), nn.Linear(128, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 64)
)
# Not prepared: the loss gives its own parameters the whole gradient on every rank, so nothing is to be averaged.
loss = InfoNCE(temperature=0.05, learnable_temperature=True).to(accelerator.device)
optimizer = torch.optim.AdamW([*encoder.parameters(), *loss.parameters()], lr=1e-3)

anchors = torch.randint(5_000, (2_048, 12))
positives = torch.where(torch.rand(2_048, 12) < 0.5, anchors, torch.randint(5_000, (2_048, 12)))
loader = DataLoader(TensorDataset(anchors, positives), batch_size=512, shuffle=True, drop_last=True)
encoder, optimizer, loader = accelerator.prepare(encoder, optimizer, loader)

memory = StepMemory("80%")  # one object for all steps: it probes once, and remembers what did not fit
for batch in loader:
    optimizer.zero_grad()
    # In place of accelerator.backward(loss(encoder(a), encoder(p))). The prepared encoder carries DDP and autocast.
    # With an fp16 scaler give scale=accelerator.scaler.get_scale(); when accumulating, scale=1 / steps under
    # accelerator.accumulate.
    value = cached_step(loss, encoder, list(batch), mini_batch_size="auto", keep_graphs="auto", memory=memory)
    accelerator.clip_grad_norm_(encoder.parameters(), 1.0)
    optimizer.step()
    accelerator.print(f"loss {value.item():.3f}, temperature {loss.temperature:.4f}")
accelerator.end_training()
