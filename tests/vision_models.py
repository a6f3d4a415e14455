"""Tiny models for images and texts, made from configuration, one of each way in which pixels lie in a batch.

clip, siglip        a row is an image or a text
vit                 images alone
qwen2vl, qwen3vl    patches of all images one after the other, counted by grids; positions in three axes (M-RoPE)
llava, gemma3       images of all rows one after the other
idefics3            images of a row padded to the most images of any
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

CHAT_MODELS = ("qwen2vl", "qwen3vl", "llava", "gemma3", "idefics3")
PAIR_MODELS = ("clip", "siglip")
KINDS = (*PAIR_MODELS, "vit", *CHAT_MODELS)
LORA_TARGETS = ["q_proj", "v_proj"]  # of texts in all, of pictures in most
WIDTH = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
IMAGE = {"qwen2vl": "<|image_pad|>", "qwen3vl": "<|image_pad|>", "gemma3": "<start_of_image>"}
SENTENCES = ("a red square", "find the blue dot on a green field", "what is shown in the picture")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "BEFOREIMAGEAFTER{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
)


def tokenizer(kind: str) -> Any:
    """Words, numbers, and what the kind calls its images."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = [*SPECIAL, "<|image_pad|>", "<|video_pad|>", "<image>", "<fake_token_around_image>", "<global-img>"]
    special += ["<start_of_image>", "<image_soft_token>", "<end_of_image>"]
    special += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    words = [
        *special,
        *sorted({word for sentence in SENTENCES for word in sentence.split()}),
        "user",
        *map(str, range(100)),
    ]
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    if kind in PAIR_MODELS:
        made.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])  # pyright: ignore
    names = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[4:],
        model_max_length=32 if kind in PAIR_MODELS else 256,
        **({"extra_special_tokens": names} if kind == "gemma3" else {}),
    )


def chat(kind: str) -> str:
    """The template of a kind's messages."""
    around = ("<|vision_start|>", "<|vision_end|>") if kind.startswith("qwen") else ("", "")
    template = CHAT.replace("IMAGE", IMAGE.get(kind, "<image>"))
    return template.replace("BEFORE", around[0]).replace("AFTER", around[1])


def _clip(text: Any) -> tuple[Any, Any]:
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    of_text = {**WIDTH, "vocab_size": len(text), "max_position_embeddings": 32}
    of_text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = CLIPConfig(
        text_config=of_text, vision_config={**WIDTH, "image_size": 16, "patch_size": 8}, projection_dim=16
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return CLIPModel(config), CLIPProcessor(images, text)


def _siglip(text: Any) -> tuple[Any, Any]:
    from transformers import SiglipConfig, SiglipModel, SiglipProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    of_text = {**WIDTH, "vocab_size": len(text), "max_position_embeddings": 32, "projection_size": 32}
    of_text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = SiglipConfig(text_config=of_text, vision_config={**WIDTH, "image_size": 16, "patch_size": 8})
    return SiglipModel(config), SiglipProcessor(SiglipImageProcessorPil(size={"height": 16, "width": 16}), text)


def _vit(_: Any) -> tuple[Any, Any]:
    from transformers import ViTConfig, ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    model = ViTModel(ViTConfig(**WIDTH, image_size=16, patch_size=8), add_pooling_layer=False)
    return model, ViTImageProcessorPil(size={"height": 16, "width": 16})


def _rope(text: Any, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4, **more}
    of_text = {**WIDTH, "num_key_value_heads": 1, "vocab_size": len(text), "max_position_embeddings": 512}
    return of_text | {"pad_token_id": 0, "rope_parameters": rope, "rope_scaling": rope}


def _tokens(text: Any) -> dict[str, int]:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {name: text.convert_tokens_to_ids(token) for name, token in names.items()}


@cache
def images_only(kind: str) -> type:
    """The processor of a Qwen without its part for videos, which needs torchvision; loading a folder finds it then."""
    from transformers import AutoProcessor, Qwen2VLConfig, Qwen2VLProcessor, Qwen3VLConfig, Qwen3VLProcessor

    processor = Qwen2VLProcessor if kind == "qwen2vl" else Qwen3VLProcessor
    config = Qwen2VLConfig if kind == "qwen2vl" else Qwen3VLConfig

    class ImagesOnly(processor):
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    ImagesOnly.__name__ = f"ImagesOnly{processor.__name__}"
    AutoProcessor.register(config, ImagesOnly, exist_ok=True)
    return ImagesOnly


def _qwen2vl(text: Any) -> tuple[Any, Any]:
    from transformers import Qwen2VLConfig, Qwen2VLModel
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=_rope(text), vision_config=vision, **_tokens(text))
    images = Qwen2VLImageProcessorPil(patch_size=4, min_pixels=8 * 8, max_pixels=32 * 32)
    return Qwen2VLModel(config), images_only("qwen2vl")(images, text, chat_template=chat("qwen2vl"))


def _qwen3vl(text: Any) -> tuple[Any, Any]:
    from transformers import Qwen3VLConfig, Qwen3VLModel
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    of_text = _rope(text, mrope_interleaved=True) | {"head_dim": 16}
    config = Qwen3VLConfig(text_config=of_text, vision_config=vision, **_tokens(text))
    images = Qwen2VLImageProcessorPil(patch_size=4, min_pixels=8 * 8, max_pixels=32 * 32)
    return Qwen3VLModel(config), images_only("qwen3vl")(images, text, chat_template=chat("qwen3vl"))


def _llava(text: Any) -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaModel, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**WIDTH, image_size=16, patch_size=8),
        text_config=LlamaConfig(**WIDTH, vocab_size=len(text), max_position_embeddings=512, pad_token_id=0),
        image_token_index=text.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        images,
        text,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat("llava"),
    )
    return LlavaModel(config), processor


def _gemma3(text: Any) -> tuple[Any, Any]:
    from transformers import Gemma3Config, Gemma3Model, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    of_text = {**WIDTH, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(text), "sliding_window": 64}
    config = Gemma3Config(
        text_config=of_text | {"max_position_embeddings": 512, "query_pre_attn_scalar": 16},
        vision_config={**WIDTH, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        boi_token_index=text.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=text.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=text.convert_tokens_to_ids("<image_soft_token>"),
    )
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return Gemma3Model(config), Gemma3Processor(images, text, chat_template=chat("gemma3"), image_seq_length=4)


def _idefics3(text: Any) -> tuple[Any, Any]:
    from transformers import Idefics3Config, Idefics3Model, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    config = Idefics3Config(
        vision_config={**WIDTH, "image_size": 16, "patch_size": 4},
        text_config={"model_type": "llama", **WIDTH, "vocab_size": len(text), "max_position_embeddings": 512},
        image_token_id=text.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return Idefics3Model(config), Idefics3Processor(images, text, image_seq_len=4, chat_template=chat("idefics3"))


@cache
def folder_of(kind: str) -> Path:
    """A sentence-transformers model folder of the kind, made once a process."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    folder = Path(mkdtemp(prefix=f"{kind}-"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = globals()[f"_{kind}"](tokenizer(kind))
        for parameter in model.parameters():
            if not parameter.any():  # Gemma's projection of images, biases
                torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder / "inner")
    processor.save_pretrained(folder / "inner")
    modules: list[Any] = [Transformer(str(folder / "inner"))]
    if kind not in PAIR_MODELS:
        modules += [Pooling(32, "cls" if kind == "vit" else "lasttoken"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder / "model"))
    return folder / "model"


def load(
    kind: str, *, dropout: float = 0.0, lora: bool = False, checkpointing: bool = False, folder: Path | None = None
) -> Any:
    """The model in float64 and training mode; dropout only where asked for. Ranks are given its folder."""
    import torch
    from sentence_transformers import SentenceTransformer

    if kind.startswith("qwen"):
        images_only(kind)
    model = SentenceTransformer(str(folder or folder_of(kind)), device="cpu").double().train()
    if lora:
        from peft import LoraConfig

        with torch.random.fork_rng():
            torch.manual_seed(1)
            model.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=LORA_TARGETS))
        model.double()
    for part in model.modules():
        if type(part).__name__ == "Gemma3RMSNorm":
            part.forward = partial(_wide_norm, part)
        if isinstance(part, torch.nn.Dropout):
            part.p = dropout
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, dropout)
        if checkpointing and hasattr(part, "gradient_checkpointing_enable"):
            part.gradient_checkpointing_enable()
    return model


def _wide_norm(norm: Any, x: Any) -> Any:
    """Gemma's norm, which is computed in float32 whatever it is given, in float64."""
    return norm._norm(x) * (1.0 + norm.weight)


def image(number: int) -> Any:
    """An image of one of several sizes: a square on a coloured ground, no two alike."""
    import numpy as np
    from PIL import Image

    height, width = ((16, 16), (24, 16), (12, 20), (30, 30))[number % 4]
    pixels = np.full((height, width, 3), (number * 37 % 255, number * 91 % 255, number * 53 % 255), np.uint8)
    pixels[2 : 8 + number % 3, 3:9] = (number * 11 % 255, 255 - number * 29 % 255, number * 71 % 255)
    return Image.fromarray(pixels)


def text(number: int) -> str:
    """A text of one of several lengths."""
    return " ".join(SENTENCES[: 1 + number % 3]) + f" {number % 100}"


def forms(kind: str) -> tuple[str, ...]:
    """What the kind takes."""
    if kind == "vit":
        return ("image",)
    return ("text", "image") if kind in PAIR_MODELS else ("text", "image", "both", "several", "mixed")


def rows(form: str, count: int, *, first: int = 0) -> list[Any]:
    """Inputs of one form: `text`, `image`, `both`, `several` (0 to 3 images and a text), `mixed` (all of them)."""
    made: list[Any] = []
    for number in range(first, first + count):
        kind = form if form != "mixed" else ("text", "image", "both", "several")[number % 4]
        if kind == "text":
            made.append(text(number))
        elif kind == "image":
            made.append(image(number))
        elif kind == "both":
            made.append({"text": text(number), "image": image(number)})
        else:
            images = [image(number * 7 + place) for place in range(number % 4)]
            made.append({"text": text(number), "image": images} if images else text(number))
    return made
