"""The tasks of MMEB: of which kind each is, and what B3 sets by it. Twenty to train on, sixteen more to evaluate.

Names: the hub's TIGER-Lab/MMEB-train and MMEB-eval. Kinds: VLM2Vec, arXiv 2410.05160, table 1. Ranks: B3, arXiv
2505.11293, section 4, and the name of its released run (30.130, 70.170 and 30% of the labels); target prompts:
`eval_mmeb.py` of github.com/raghavlite/B3.
"""

from __future__ import annotations

from typing import Any, Literal

Kind = Literal["retrieval", "grounding", "vqa", "classification"]
_NAMES: dict[Kind, str] = {  # the first line of each: to train on, and to evaluate; the second: to evaluate only
    "retrieval": "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA "
    "Wiki-SS-NQ OVEN FashionIQ EDIS",
    "grounding": "MSCOCO "
    "RefCOCO RefCOCO-Matching Visual7W-Pointing",
    "vqa": "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W "
    "ScienceQA GQA TextVQA VizWiz",
    "classification": "ImageNet_1K N24News HatefulMemes VOC2007 SUN397 "
    "ImageNet-1K Place365 ImageNet-A ImageNet-R ObjectNet Country211",  # ImageNet_1K has another name there
}  # fmt: skip
TASKS: dict[str, Kind] = {name: kind for kind, names in _NAMES.items() for name in names.split()}
# Ranks [p, m] of mining. The first p are likely right answers: more of them where answers are short and repeat. Of
# labels all but the own are wrong: their window is by share, which mining finds itself ("auto").
WINDOWS: dict[Kind, tuple[int, int]] = {"retrieval": (30, 100), "grounding": (30, 100), "vqa": (70, 100)}
_PROMPTS: dict[Kind, str] = {"classification": "Represent the class label: ", "vqa": "Represent the answer: "}
# What is put before targets, in training and in evaluation; "" for none. Targets of `_i2t` are texts to images.
TARGET_PROMPTS: dict[str, str] = {
    name: "Represent the image caption: " if name.endswith("_i2t") else _PROMPTS.get(kind, "")
    for name, kind in TASKS.items()
}


def task_settings(name: str) -> dict[str, Any]:
    """What B3 sets for a training set of this name, as in `data.sets`; nothing for a task that is none of MMEB's.

    >>> task_settings("ChartQA")
    {'window': [70, 100], 'positive_prompt': 'Represent the answer: '}
    """
    kind, prompt = TASKS.get(name), TARGET_PROMPTS.get(name)
    window = {"window": list(WINDOWS[kind])} if kind in WINDOWS else {}
    return window | ({"positive_prompt": prompt} if prompt else {})
