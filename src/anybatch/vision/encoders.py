"""Modules of sentence-transformers for images without labels: a small residual network, and a projection head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers.base.modules import InputModule, Module
from torch import Tensor, nn

SMALL_RESNET = "small-resnet"  # the name of the built-in network


class _Saved(Module):
    """Weights and configuration as one file each."""

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Into a folder."""
        self.save_config(output_path)
        self.save_torch_weights(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", *args: Any, **kwargs: Any) -> Any:
        """From such a folder."""
        module = cls(**cls.load_config(model_name_or_path, subfolder=subfolder))
        return cls.load_torch_weights(model_name_or_path, subfolder=subfolder, model=module)


class SmallResNet(_Saved, InputModule):
    """A residual network of three blocks for small pictures, with random weights: images to (B, 4 width) embeddings.

    Normalised by groups of channels: an embedding does not depend on the batch that its image is in.

    Args:
        width: Channels of the first block, a multiple of 8.
        side: Images are resized to side x side pixels.

    Example:
        >>> from PIL import Image
        >>> from sentence_transformers import SentenceTransformer
        >>> model = SentenceTransformer(modules=[SmallResNet(width=16)], device="cpu")
        >>> model.encode([Image.new("RGB", (60, 40))]).shape
        (1, 64)
    """

    config_keys = ["width", "side"]  # noqa: RUF012 - as its base class has it

    def __init__(self, width: int = 32, side: int = 32) -> None:
        super().__init__()
        self.width, self.side = width, side
        self.layers = nn.Sequential(
            *_convolution(3, width, 3, 2),
            nn.ReLU(),
            ResidualBlock(width, width, 1),
            ResidualBlock(width, 2 * width, 2),
            ResidualBlock(2 * width, 4 * width, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )

    @property
    def modalities(self) -> list[Any]:
        """What it takes."""
        return ["image"]

    def get_embedding_dimension(self) -> int:
        """Width of its embeddings."""
        return 4 * self.width

    def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Decoded images as (B, 3, side, side) in [0, 1]."""
        pixels = [np.asarray(image.convert("RGB").resize((self.side, self.side), 1)) for image in inputs]  # 1: Lanczos
        return {"pixel_values": torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255, "modality": "image"}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds the embeddings to the features."""
        pixels = features["pixel_values"].contiguous(memory_format=torch.channels_last)
        return {**features, "sentence_embedding": self.layers(pixels)}


def small_resnet(name: str) -> SmallResNet | None:
    """A new network for its name, a saved one for the folder of one; None for any other name of a model."""
    if name == SMALL_RESNET:
        return SmallResNet()
    modules = Path(name) / "modules.json"
    # sentence-transformers imports classes of other packages if asked to trust the folder, code in it included.
    kinds = [part["type"] for part in json.loads(modules.read_text("utf-8"))] if modules.is_file() else []
    return SmallResNet.load(name) if kinds == [f"{SmallResNet.__module__}.{SmallResNet.__qualname__}"] else None


class ProjectionHead(_Saved):
    """SimCLR's two layers behind an encoder: what the loss compares in training. In evaluation mode embeddings pass
    through, so that a model is measured without its head; it is dropped when training ends.

    >>> head = ProjectionHead(4, 2)
    >>> features = {"sentence_embedding": torch.ones(1, 4)}
    >>> head.train()(features)["sentence_embedding"].shape, head.eval()(features)["sentence_embedding"].shape
    (torch.Size([1, 2]), torch.Size([1, 4]))
    """

    config_keys = ["width", "out"]  # noqa: RUF012

    def __init__(self, width: int, out: int = 128) -> None:
        super().__init__()
        self.width, self.out = width, out
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Projects the embeddings while training."""
        if not self.training:
            return features
        embeddings = features["sentence_embedding"].to(self.layers[0].weight.dtype)  # of an encoder in bfloat16
        return {**features, "sentence_embedding": self.layers(embeddings)}


class ResidualBlock(nn.Module):
    """Two convolutions of 3 x 3 beside a short cut: (B, width, H, W) -> (B, out, H / stride, W / stride)."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(*_convolution(width, out, 3, stride), nn.ReLU(), *_convolution(out, out, 3, 1))
        self.short_cut = nn.Sequential() if stride == 1 else nn.Sequential(*_convolution(width, out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """See above."""
        return (self.short_cut(x) + self.residual(x)).relu()


def _convolution(width: int, out: int, side: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(width, out, side, stride, side // 2, bias=False), nn.GroupNorm(out // 8, out)
