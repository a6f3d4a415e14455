"""Published runs as sets of defaults under what a user sets: `anybatch train --recipe NAME`. The run's config.yaml
holds every value, so that it is resumed without the recipe.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from anybatch.core import distributed
from anybatch.data.sets import find_sets
from anybatch.vision.mmeb import TASKS, task_settings

logger = logging.getLogger("anybatch")
Tree = dict[str, Any]

# B3++ on MMEB (arXiv 2505.11293, and the command that its README gives): Qwen2-VL, 2,000 steps of 1,024 rows. Clusters
# of 32, published windows (by task: vision/mmeb.py) are what mining.method=published stands for. LoRA:
# r from the command, the rest its code's defaults. Pixels: as the processor has them, 4 to 1,280 patches of 28 x 28.
B3: Tree = {
    "batch_size": 1024,
    "evaluation": {"path": None},  # all pairs are trained on
    "data": {"negatives": []},  # those of the files are not used: hard negatives are mined
    "model": {
        "lora": {
            "r": 8,
            "lora_alpha": 64,
            "lora_dropout": 0.1,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
        }
    },
    "mining": {"method": "published", "num_negatives": 5, "mixing": "within"},
    "loss": {"name": "infonce", "temperature": 0.02, "weights": "none", "mask_suspects": False},
    "train": {
        "learning_rate": 1e-4,
        "mini_batch_size": "auto",
        "args": {"max_steps": 2000, "warmup_steps": 0.1, "bf16": True},
    },
}


def b3(tree: Tree) -> Tree:
    """`B3` under the settings of `tree`; a folder of tasks becomes `data.sets`, each with its window and prompt.

    A window that the user sets for all tasks (`mining.window`) is left to hold for all.
    """
    tree = under(B3, tree)
    data = dict(tree.get("data") or {})
    sets = [dict(of_set) for of_set in data.get("sets") or ()]
    if not sets and data.get("path") is not None:
        sets = [{"path": str(path), "name": name} for name, path in find_sets(data["path"]).items()]
    if sets:
        data = {key: value for key, value in data.items() if key != "path"}
    unknown = []
    for of_set in sets:
        name = of_set.get("name") or Path(of_set.get("path", "")).name.split(".")[0]
        settings = task_settings(name)
        if "window" in (tree.get("mining") or {}):
            settings.pop("window", None)
        of_set |= {key: value for key, value in settings.items() if key not in of_set}
        if name not in TASKS:
            unknown.append(name)
    if distributed.rank() == 0:
        logger.info("Recipe b3: %s.", shown(B3))
        if unknown:
            logger.info(
                "Not tasks of MMEB: %s. Their windows follow from their positives (labels where there are few, else "
                "ranks 30 to 130), and they have no target prompt: set data.sets[].window and positive_prompt.",
                ", ".join(unknown),
            )
    return tree | {"data": data | ({"sets": sets} if sets else {})}


RECIPES: dict[str, Callable[[Tree], Tree]] = {"b3": b3}


def under(defaults: Mapping[str, Any], tree: Mapping[str, Any]) -> Tree:
    """Nested settings, with defaults where the user says nothing.

    >>> under({"train": {"epochs": 9, "memory": "50%"}}, {"seed": 1, "train": {"epochs": 5}})
    {'train': {'epochs': 5, 'memory': '50%'}, 'seed': 1}
    """
    joined = dict(defaults) | dict(tree)
    for key, value in defaults.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key, {}), Mapping):
            joined[key] = under(value, tree.get(key, {}))
    return joined


def shown(tree: Mapping[str, Any], prefix: str = "") -> str:
    """Settings on one line: "batch_size=1024, mining.method=published"."""
    return ", ".join(
        shown(value, f"{prefix}{key}.") if isinstance(value, Mapping) else f"{prefix}{key}={value}"
        for key, value in tree.items()
    )
