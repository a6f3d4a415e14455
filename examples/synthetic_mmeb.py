"""A small folder in MMEB's layout: six tasks of all kinds about drawn shapes. Usage: synthetic_mmeb.py FOLDER [ROWS]

Training folders are FOLDER/train/TASK with the splits original and diverse_instruction, evaluation folders
FOLDER/eval/TASK, and the one image root is FOLDER/images. Needs Pillow and pyarrow.
"""

import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image, ImageDraw

COLOURS, SHAPES, SIZE, HERE = ("red", "green", "blue", "orange"), ("circle", "square", "bar"), 32, "<|image_1|>\n"
THINGS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
WORDINGS = {  # of a task's instruction: that of the split original, and another
    "ImageNet_1K": ("Represent the given image for classification", "Which thing is it?"),
    "A-OKVQA": ("Represent the given image with the following question:", "Answer from the image:"),
    "MSCOCO_t2i": ("Find me an image that matches the given caption:", "Which image shows this?"),
    "MSCOCO_i2t": ("Find an image caption describing the given image.", "Describe the image."),
    "CIRR": ("Given an image, find a similar image with the described changes:", "Find it changed:"),
    "MSCOCO": ("Select the portion of the image that isolates the object labeled as", "Cut out the"),
}


def draw(root: Path, task: str, things: list[tuple[str, str]], dice: random.Random) -> str:
    """Draw one thing, or two side by side; the path below the image root."""
    picture = Image.new("RGB", (SIZE * len(things), SIZE), tuple(dice.randrange(200, 256) for _ in range(3)))
    for place, (colour, shape) in enumerate(things):
        left, top, width = place * SIZE + dice.randrange(2, 12), dice.randrange(2, 12), dice.randrange(12, 18)
        pen = ImageDraw.Draw(picture).ellipse if shape == "circle" else ImageDraw.Draw(picture).rectangle
        pen((left, top, left + width, top + (width // 3 if shape == "bar" else width)), fill=colour)
    picture.save(root / (path := f"{task}/{dice.getrandbits(40):010x}.png"))
    return path


def example(root: Path, task: str, wording: str, dice: random.Random) -> tuple[tuple[str, str], list[tuple[str, str]]]:
    """A query and its candidates, the right one first; each a text and the path of an image, either may be empty."""
    thing, *others = dice.sample(THINGS, 4)
    texts = [f"a {colour} {shape}" for colour, shape in (thing, *others)]
    if task in ("ImageNet_1K", "MSCOCO_i2t"):
        return (f"{HERE}{wording}", draw(root, task, [thing], dice)), [(text, "") for text in texts]
    if task == "A-OKVQA":
        query = (f"{HERE}{wording} What colour has the {thing[1]}?", draw(root, task, [thing], dice))
        return query, [(colour, "") for colour in sorted(COLOURS, key=lambda colour: colour != thing[0])]
    images = [(f"{HERE}Represent the given image.", draw(root, task, [each], dice)) for each in (thing, *others)]
    if task == "MSCOCO_t2i":
        return (f"{wording} {texts[0]}", ""), images
    if task == "CIRR":
        return (f"{HERE}{wording} {thing[0]}", draw(root, task, [(others[0][0], thing[1])], dice)), images
    return (f"{HERE}{wording} {texts[0][2:]}", draw(root, task, dice.sample([thing, others[0]], 2), dice)), images


def write_mmeb(folder: Path, num_rows: int = 48, seed: int = 0) -> None:
    """Write the tasks: `num_rows` rows of training a task, a third as many of evaluation."""
    dice, root = random.Random(seed), folder / "images"
    for task, (usual, other) in WORDINGS.items():
        for place in (root / task, folder / "train" / task, folder / "eval" / task):
            place.mkdir(parents=True)
        rows = [example(root, task, usual, dice) for _ in range(num_rows + num_rows // 3)]
        for split, wordings in (("original", (usual,)), ("diverse_instruction", (usual, other))):
            table = []
            for (text, image), (right, *wrong) in rows[:num_rows]:
                few = wrong[: dice.randrange(4)]  # lists in two tasks, of any length; an empty text in the others
                negatives = [[one[part] for one in few] if task in ("A-OKVQA", "CIRR") else "" for part in (0, 1)]
                table.append((text.replace(usual, dice.choice(wordings)), image, *right, *negatives))
            names = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
            columns = dict(zip(names, map(list, zip(*table, strict=True)), strict=True))
            parquet.write_table(pa.table(columns), folder / "train" / task / f"{split}-00000-of-00001.parquet")
        table = [(*query, *map(list, zip(*candidates, strict=True))) for query, candidates in rows[num_rows:]]
        names = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
        columns = dict(zip(names, map(list, zip(*table, strict=True)), strict=True))
        parquet.write_table(pa.table(columns), folder / "eval" / task / "test-00000-of-00001.parquet")


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "mmeb")
    write_mmeb(target, *map(int, sys.argv[2:3]))
    print(f"{target}: {', '.join(WORDINGS)}")
