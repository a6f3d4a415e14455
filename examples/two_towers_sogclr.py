"""Two encoders of different kinds under one two-way loss with state; stopped in mid-epoch, resumed to the same bit.

The pictures are drawn from their captions ("red square large top left"), so that the example needs no data.
"""

from itertools import chain, islice, product

import torch
from torch import nn

from anybatch import BatchPlan, PlanSampler
from anybatch.family import FastCLIP

torch.manual_seed(0)
WORDS = {
    "colour": {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1), "violet": (1, 0, 1)},
    "shape": {"square": False, "frame": True},
    "size": {"small": 2, "medium": 4, "large": 5},
    "place": {"top left": (6, 6), "top right": (6, 18), "middle": (12, 12), "low left": (18, 6), "low right": (18, 18)},
}
captions = list(product(*WORDS.values()))  # n = 150
vocabulary = {word: number for number, word in enumerate(chain(*WORDS.values()))}
bags = torch.tensor([[vocabulary[word] for word in caption] for caption in captions])


def draw(colour: str, shape: str, size: str, place: str) -> torch.Tensor:
    """(3, 24, 24): a filled square or its frame, on black, with a little noise."""
    picture, (row, column), half = torch.rand(3, 24, 24) * 0.3, WORDS["place"][place], WORDS["size"][size]
    paint = torch.tensor(WORDS["colour"][colour])[:, None, None].float()
    picture[:, row - half : row + half + 1, column - half : column + half + 1] = paint
    if WORDS["shape"][shape]:
        picture[:, row - half + 1 : row + half, column - half + 1 : column + half] = 0
    return picture


pictures, plan = torch.stack([draw(*caption) for caption in captions]), BatchPlan.random(len(captions), 16, seed=0)


def train(num_steps: int, *, checkpoint: str, resume: bool) -> nn.ModuleDict:
    """Train to `num_steps` steps, from the beginning or from the checkpoint, and leave a checkpoint."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.GELU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GELU()
    model = nn.ModuleDict(
        {
            "picture": nn.Sequential(*conv, nn.Flatten(), nn.Linear(32 * 6 * 6, 64)),
            "text": nn.Sequential(nn.EmbeddingBag(len(vocabulary), 64), nn.GELU(), nn.Linear(64, 64)),
            # Two-way: 8 bytes per row. The learned temperature is the loss's own parameter, and goes to the optimizer.
            "loss": FastCLIP(len(captions), version="v3", gamma=0.5, temperature_range=(0.02, 0.2)),
        }
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    sampler, done = PlanSampler(plan), 0
    if resume:  # one state dict holds the encoders, the temperature and the memory of both directions
        state = torch.load(checkpoint)
        for name, part in (("model", model), ("optimizer", optimizer), ("sampler", sampler)):
            part.load_state_dict(state[name])
        done = state["done"]
    while done < num_steps:
        sampler.set_epoch(done // plan.num_batches)
        for rows in islice(sampler, num_steps - done):
            index = torch.tensor(rows)
            value = model["loss"](model["picture"](pictures[index]), model["text"](bags[index]), index=index)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            done += 1
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sampler": sampler.state_dict()}
    torch.save({"done": done, **states}, checkpoint)
    return model


whole = train(300, checkpoint="whole.pt", resume=False)
train(155, checkpoint="parts.pt", resume=False)  # stops inside an epoch
parts = train(300, checkpoint="parts.pt", resume=True)
for name, value in whole.state_dict().items():
    assert torch.equal(value, parts.state_dict()[name]), f"{name} differs from the uninterrupted run"
with torch.no_grad():
    scores = nn.functional.normalize(whole["picture"](pictures)) @ nn.functional.normalize(whole["text"](bags)).T
right = (scores.argmax(1) == torch.arange(len(captions))).float().mean()
print(f"pictures that find their caption: {right:.0%}; the resumed run is the uninterrupted one")
