"""The tasks of MMEB: of which kind each is, and what B3 sets by it. Twenty to train on, sixteen more to evaluate.

Names: the hub's TIGER-Lab/MMEB-train and MMEB-eval. Kinds: VLM2Vec, arXiv 2410.05160, table 1. Ranks: B3, arXiv
2505.11293, section 4, and the name of its released run (30.130, 70.170 and 30% of the labels); target prompts:
`eval_mmeb.py` of github.com/raghavlite/B3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["retrieval", "grounding", "vqa", "classification"]
# The first p ranks are likely right answers: more of them where answers are short and repeat. Of labels all but the
# own are wrong: their window is by share, which mining finds itself ("auto").
WINDOWS: dict[Kind, tuple[int, int] | None] = {
    "retrieval": (30, 100),
    "grounding": (30, 100),
    "vqa": (70, 100),
    "classification": None,
}
PROMPTS: dict[Kind, str] = {"classification": "Represent the class label: ", "vqa": "Represent the answer: "}
CAPTION_PROMPT = "Represent the image caption: "  # of retrieval whose targets are texts to images


@dataclass(frozen=True)
class Task:
    """One task: its kind, and whether it is trained on.

    >>> TASKS["ChartQA"].window, TASKS["ChartQA"].target_prompt
    ((70, 100), 'Represent the answer: ')
    """

    name: str
    kind: Kind
    trained: bool

    @property
    def window(self) -> tuple[int, int] | None:
        """Ranks [p, m] of mining; None: as mining finds, see `WINDOWS`."""
        return WINDOWS[self.kind]

    @property
    def target_prompt(self) -> str:
        """What is put before targets, in training and in evaluation; "" for none."""
        return CAPTION_PROMPT if self.name.endswith("_i2t") else PROMPTS.get(self.kind, "")


_NAMES: dict[Kind, tuple[str, str]] = {  # to train on and to evaluate; to evaluate only
    "retrieval": (
        "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA",
        "Wiki-SS-NQ OVEN FashionIQ EDIS",
    ),
    "grounding": ("MSCOCO", "RefCOCO RefCOCO-Matching Visual7W-Pointing"),
    "vqa": ("OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W", "ScienceQA GQA TextVQA VizWiz"),
    "classification": (
        "ImageNet_1K N24News HatefulMemes VOC2007 SUN397",
        "ImageNet-1K Place365 ImageNet-A ImageNet-R ObjectNet Country211",  # ImageNet_1K has another name there
    ),
}
TASKS: dict[str, Task] = {
    name: Task(name, kind, trained)
    for kind, both in _NAMES.items()
    for trained, names in zip((True, False), both, strict=True)
    for name in names.split()
}


def task_settings(name: str) -> dict[str, Any]:
    """What B3 sets for a training set of this name, as in `data.sets`; nothing for a task that is none of MMEB's."""
    task = TASKS.get(name)
    if task is None:
        return {}
    window = {} if task.window is None else {"window": list(task.window)}
    return window | ({"positive_prompt": task.target_prompt} if task.target_prompt else {})
