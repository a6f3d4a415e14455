"""Random views of images, drawn again exactly: SimCLR's augmentation as a function of pixels and of a key per row. So a
replay, a resumed run and any number of ranks see the same pixels, and no generator is advanced.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from anybatch.core.errors import AnybatchError

KEYS = "view_keys"  # in the features of a column: which view of each row is meant
PIXELS = "pixel_values"
AREA = (0.08, 1.0)  # of the crop, as a share of the image
LOG_RATIO = math.log(4 / 3)  # of the crop: between 3 / 4 and 4 / 3
SMALL = 64  # pixels: below it images are small ones, with half the colour jitter and no blur (SimCLR, B.9)
NUMBERS = 13  # random ones that a view takes
GOLDEN = -7046029254386353131  # 2^64 / golden ratio


def both_ways(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Anchors and candidates (2 B, D) of two views (B, D): each view is an anchor, and the other one its positive.

    With `index.repeat(2)` the two views of a row are no negatives of each other, and all 2 B - 2 of other rows are:
    with `InfoNCE` that is SimCLR's NT-Xent, with `SogCLR` its released form for images, one state an image.

    >>> from anybatch.losses import InfoNCE
    >>> first, second = torch.eye(3), torch.eye(3)
    >>> loss = InfoNCE(temperature=1.0)
    >>> round(loss(*both_ways(first, second), index=torch.arange(3).repeat(2)).item(), 4)  # log(e + 4) - 1
    0.9048
    """
    return torch.cat([first, second]), torch.cat([second, first])


def views_of(pixels: Tensor, keys: Tensor, mean: Tensor, std: Tensor) -> list[Tensor]:
    """Views, one for each column of `keys` (B, V), of pixels that are normalised by `mean` and `std` (3,)."""
    mean, std = (values.to(pixels)[:, None, None] for values in (mean, std))
    with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
        plain = (pixels * std + mean).clamp(0, 1)
        return [(random_views(plain, of_view) - mean) / std for of_view in keys.to(pixels.device).unbind(dim=1)]


def view_keys(rows: Tensor, *, seed: int, step: int, view: int) -> Tensor:
    """(B,) int64 keys of one view of these rows at one step: another key for each row, step, view and seed."""
    key = torch.zeros_like(rows)
    for part in (seed, step, view, rows):
        key = _mixed(key + part)
    return key


def random_numbers(keys: Tensor, count: int) -> Tensor:
    """(B, count) float32 in [0, 1), the same on every device: `count` numbers of each key's own stream."""
    stream = keys[:, None] + torch.arange(1, count + 1, device=keys.device) * GOLDEN
    return ((_mixed(stream) >> 40) & (2**24 - 1)).to(torch.float32) / 2**24


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64, which wraps around; a shift there keeps the sign, which is masked out."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & (2**33 - 1))


def random_views(pixels: Tensor, keys: Tensor) -> Tensor:
    """One random view of each image: SimCLR's crop, flip, colour jitter, greyscale and blur, each with its own draw.

    Differences from SimCLR's released code: the four colour changes come in one order, a crop that would not fit is
    cut to the image's side instead of drawn again, and crops are read bilinearly.

    Args:
        pixels: (B, 3, H, W) float in [0, 1].
        keys: (B,) int64, see `view_keys`.

    Returns:
        (B, 3, H, W), in [0, 1].

    Reference: Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", appendix A.
    """
    try:
        from kornia import color, enhance, filters
    except ImportError as error:
        raise AnybatchError(
            "Random views of images are made by kornia. Install it with: pip install 'anybatch[vision]'"
        ) from error
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise AnybatchError(f"The pixels have shape {tuple(pixels.shape)}; expected images (B, 3, H, W).")
    number = random_numbers(keys, NUMBERS).to(pixels.dtype).unbind(dim=1)
    between = lambda place, low, high: low + (high - low) * number[place]  # noqa: E731
    chosen = lambda place, share: (number[place] < share)[:, None, None, None]  # noqa: E731

    # 1. Crop and flip, one affine map.
    area, ratio = between(0, *AREA), between(1, -LOG_RATIO, LOG_RATIO).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    map_B23 = pixels.new_zeros(len(pixels), 2, 3)
    map_B23[:, 0, 0] = torch.where(number[4] < 0.5, -width, width)
    map_B23[:, 1, 1] = height
    map_B23[:, 0, 2] = (1 - width) * between(2, -1, 1)
    map_B23[:, 1, 2] = (1 - height) * between(3, -1, 1)
    grid = functional.affine_grid(map_B23, list(pixels.shape), align_corners=False)
    views = functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)

    # 2. Colour: jitter with chance .8, grey with .2.
    small = min(pixels.shape[2:]) < SMALL
    strength = 0.4 if small else 0.8
    jittered = enhance.adjust_brightness_accumulative(views, between(6, 1 - strength, 1 + strength))
    jittered = enhance.adjust_contrast_with_mean_subtraction(jittered, between(7, 1 - strength, 1 + strength))
    jittered = enhance.adjust_saturation_with_gray_subtraction(jittered, between(8, 1 - strength, 1 + strength))
    jittered = enhance.adjust_hue(jittered, between(9, -strength / 4, strength / 4) * 2 * math.pi)
    views = torch.where(chosen(5, 0.8), jittered, views)
    views = torch.where(chosen(10, 0.2), color.rgb_to_grayscale(views).expand_as(views), views)

    # 3. Blur with chance .5, over a tenth of the side.
    if small:
        return views
    side = min(pixels.shape[2:]) // 10 // 2 * 2 + 1
    sigma = between(12, 0.1, 2.0)[:, None].expand(-1, 2)
    return torch.where(chosen(11, 0.5), filters.gaussian_blur2d(views, (side, side), sigma), views)
