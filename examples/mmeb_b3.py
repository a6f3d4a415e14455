"""The run of the B3 paper on MMEB, and the same on a drawn folder in MMEB's layout with a tiny vision-language model.

The paper's run (B3++, Qwen2-VL 2B, 2,000 steps of 1,024 rows; arXiv 2505.11293), on eight GPUs:

    huggingface-cli download TIGER-Lab/MMEB-train --repo-type dataset --local-dir MMEB-train    # unpack images_zip/*
    torchrun --nproc_per_node 8 -m anybatch train --data MMEB-train --images MMEB-train/images --recipe b3 \
        --model Qwen/Qwen2-VL-2B-Instruct --teacher TEACHER --output runs/b3
    anybatch evaluate runs/b3/model --data MMEB-eval --images eval_images --recipe b3

TEACHER is any sentence-transformers model for images and texts; CLIP is .3 points behind one of 7B in the paper.
"""

import subprocess
import sys
from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from synthetic_mmeb import COLOURS, SHAPES, WORDINGS, write_mmeb
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaModel,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
CHAT = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% elif 'text' in c %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}</s>"
)


def make_model(folder: Path) -> None:
    """A LLaVA of two layers and width 64, with the words of the drawn tasks."""
    set_seed(0)
    texts = [*(text for both in WORDINGS.values() for text in both), *COLOURS, *SHAPES, "a class label What has ? : ."]
    split = pre_tokenizers.Whitespace()
    words = {word: None for text in texts for word, _ in split.pre_tokenize_str(text)}
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    names = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), SPECIAL, strict=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, additional_special_tokens=SPECIAL[4:])
    width = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**width, image_size=32, patch_size=8),
        text_config=LlamaConfig(**width, vocab_size=len(vocabulary), max_position_embeddings=256, pad_token_id=0),
        image_token_index=4,
        image_seq_length=16,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    options = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1, "chat_template": CHAT}
    LlavaProcessor(images, fast, patch_size=8, **options).save_pretrained(folder / "plain")
    LlavaModel(config).save_pretrained(folder / "plain")
    modules = [Transformer(str(folder / "plain")), Pooling(64, "lasttoken"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder / "model"))


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "mmeb-b3")
    write_mmeb(folder, 24)
    make_model(folder)
    model, data = str(folder / "model"), ["--images", str(folder / "images"), "--recipe", "b3"]
    small = ["batch_size=16", "mining.cluster_size=4", "train.args.max_steps=3", "train.mini_batch_size=8"]
    small += ["train.args.bf16=false"]
    run = ["--data", str(folder / "train"), "--model", model, "--teacher", model, "--output", str(folder / "run")]
    anybatch = [sys.executable, "-m", "anybatch"]
    settings = [word for value in (*small, "model.device=cpu") for word in ("--set", value)]
    subprocess.run([*anybatch, "train", *run, *data, *settings], check=True)
    tasks = ["--data", str(folder / "eval"), "--output", str(folder / "figures.json")]
    subprocess.run([*anybatch, "evaluate", str(folder / "run/model"), *tasks, *data], check=True)
    print((folder / "figures.json").read_text())
