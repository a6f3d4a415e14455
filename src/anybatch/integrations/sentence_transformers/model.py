"""Load a sentence-transformers model, whole or only its first layers; and what it knows of queries and documents: an
anchor is a query, positives and negatives are documents, with the prompts and routes (two towers) that `encode_query`
and `encode_document` use. The prompts of a configuration go into the model, which saves them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from anybatch.core.configuration import Configuration, Count, Range
from anybatch.core.errors import AnybatchError
from anybatch.core.files import CONTENTS, flaw_of
from anybatch.integrations.sentence_transformers.lora import add_lora

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from anybatch.data.pairs import PairSet

logger = logging.getLogger("anybatch")
Side = Literal["query", "document"]
# Of the processor's settings, those of how it is loaded.
LOADING = ("use_fast", "backend", "revision", "token", "trust_remote_code", "cache_dir", "local_files_only")
# Of prompts and routes, the first that is there.
NAMES = {"query": ("query",), "document": ("document", "passage", "corpus", "doc")}


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Configuration):
    """Which encoder, and how much of it.

    Attributes:
        name: A folder, or a name on the Hugging Face hub; "small-resnet", an untrained network for images of 32 x 32;
            None where no model is loaded, as in mining.
        num_layers: Keep only the first layers of the transformer (a fast student); None keeps all.
        max_length: Tokens a text is cut at, in the saved model as well; None keeps the model's own limit.
        anchor_prompt: Text put before each anchor or query (an instruction, with its final space); None for the model's
            own, "" for none.
        positive_prompt: Text put before each positive, negative or document.
        device: Where it runs; None chooses a GPU if there is one.
        kwargs: For the loader of transformers, such as {dtype: bfloat16, attn_implementation: sdpa}; what is under
            `processor` is for its processor, such as {processor: {min_pixels: 3136, max_pixels: 1003520}}.
        lora: Train low-rank adapters alone: peft's `LoraConfig`, such as {r: 8, lora_alpha: 64, target_modules:
            [q_proj, v_proj]}. The saved model has them merged into its weights.

    Example:
        >>> ModelConfig(name="my/model", max_length=128, lora={"r": 8}).lora
        {'r': 8}
    """

    name: str | None = None
    num_layers: Count | None = None
    max_length: Annotated[int, Range(2)] | None = None
    anchor_prompt: str | None = None
    positive_prompt: str | None = None
    device: Literal["cpu", "cuda", "mps"] | None = None
    kwargs: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None

    section: ClassVar[str] = "model"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kwargs(self.kwargs, "model.kwargs")
        if self.lora is not None and self.num_layers is not None:
            raise AnybatchError(
                "model.lora and model.num_layers are given: checkpoints of adapters belong to the whole model. Cut the "
                "model first, in a run without model.lora, or leave out one of them."
            )


def check_kwargs(kwargs: dict[str, Any] | None, name: str) -> None:
    """Refuse settings of a processor that are no mapping."""
    processor = (kwargs or {}).get("processor", {})
    if not isinstance(processor, dict):
        raise AnybatchError(f"{name}.processor is {processor!r}; expected a mapping, such as {{max_pixels: 501760}}.")


def check_model(config: ModelConfig) -> None:
    """Refuse what can be refused before anything is read: no name, a folder that is not there, the device."""
    import torch

    if config.name is None:
        raise AnybatchError("Missing configuration value: model.name (--model), the model to train.")
    if not Path(config.name).exists() and (config.name.count("/") > 1 or config.name.startswith((".", "/", "~"))):
        raise AnybatchError(
            f"Cannot load the model {config.name!r}: there is no such folder. Expected the folder of a "
            "sentence-transformers model, or a hub name."
        )
    try:
        torch.empty(0, device=config.device)
    except (AssertionError, RuntimeError) as error:
        raise AnybatchError(
            f"model.device is '{config.device}', which PyTorch cannot use on this machine "
            f"({str(error).splitlines()[0]}). Leave it out, or set it to cpu."
        ) from error


def load_model(config: ModelConfig) -> SentenceTransformer:
    """Load `config.name`, cut to its first layers, set length, adapters and prompts; log what differs from its own."""
    import torch
    from sentence_transformers import SentenceTransformer

    from anybatch.vision.encoders import small_resnet

    # 1. The model.
    check_model(config)
    assert config.name is not None
    if (Path(config.name) / CONTENTS).exists() and (flaw := flaw_of(Path(config.name))) is not None:
        raise AnybatchError(
            f"{config.name} {flaw}. If you changed it yourself, delete {CONTENTS} there; else bring back the files "
            "that were saved."
        )
    kwargs = dict(config.kwargs or {})
    of_processor = kwargs.pop("processor", {})
    try:
        with torch.random.fork_rng(devices=()):  # weights that the files lack are drawn, the same ones at every load
            torch.default_generator.manual_seed(0)
            built_in = small_resnet(config.name)
            model = SentenceTransformer(
                config.name if built_in is None else None,
                modules=None if built_in is None else [built_in],
                device=config.device,
                model_kwargs=kwargs,
                processor_kwargs=dict(of_processor),
            )
    except Exception as error:  # broken, cut or pickled files fail in four libraries' readers with nearly anything
        reason = next(iter(str(error).splitlines()), "")
        if type(error).__name__ == "UnpicklingError":  # whose message advises to run what is in the file
            reason = "its weights are pickled Python objects, which are not run here; have them saved as safetensors"
        with_these = f" with the kwargs {config.kwargs}, which transformers has to know" if config.kwargs else ""
        raise AnybatchError(
            f"Cannot load the model {config.name!r}{with_these}: {reason} ({type(error).__name__}). Expected the "
            "folder of a sentence-transformers model with whole files, or a hub name that this machine can reach."
        ) from error

    if built_in is not None and config.kwargs:
        raise AnybatchError(f"kwargs are given, for the loader of transformers, which {config.name} has none of.")

    # 2. What the configuration changes in it.
    warn_of_unknown(model, of_processor)
    pool_at_the_end(model, config.name)
    if config.num_layers is not None:
        keep_first_layers(model, config.num_layers)
    if config.max_length is not None:
        _set_length(model, config.max_length, config.name)
    if config.lora is not None:
        add_lora(model, config.lora)
    own = {side: side_prompt(model, side) for side in get_args(Side)}
    given = {"query": config.anchor_prompt, "document": config.positive_prompt}
    model.prompts |= {side: prompt for side, prompt in given.items() if prompt is not None}
    _say_sides(model, config.name, own)
    return model


def is_pretrained(model: SentenceTransformer) -> bool:
    """Whether it has a network of transformers, which is pretrained as a rule: for these "auto" takes another loss."""
    from transformers import PreTrainedModel

    return any(isinstance(part, PreTrainedModel) for part in model.modules())


def warn_of_unknown(model: SentenceTransformer, settings: dict[str, Any]) -> None:
    """Warn of settings of the processor that none of its parts has: transformers drops them without a word."""
    processor = getattr(model[0], "processor", None)
    parts = [processor, *(getattr(processor, name, None) for name in ("image_processor", "tokenizer"))]
    known = [getattr(getattr(part, "valid_kwargs", None), "__annotations__", {}) for part in parts]
    unknown = [name for name in settings if not any(hasattr(part, name) for part in parts)]
    unknown = [name for name in unknown if name not in LOADING and not any(name in names for names in known)]
    if processor is not None and unknown:
        logger.warning(
            "kwargs.processor has %s, which is no attribute of the model's %s: most likely it is not used.",
            ", ".join(map(repr, unknown)), type(processor).__name__,
        )  # fmt: skip


def pool_at_the_end(model: SentenceTransformer, name: str) -> None:
    """Let a plain chat model (no sentence-transformers folder) be pooled at its last token, in place, as causal
    language models are: the first tokens of a vision-language model have seen next to nothing, and its mean would hold
    them.
    """
    from huggingface_hub import try_to_load_from_cache
    from sentence_transformers.sentence_transformer.modules import Pooling

    is_folder, listed = Path(name).is_dir(), "modules.json"
    own = (Path(name) / listed).exists() if is_folder else isinstance(try_to_load_from_cache(name, listed), str)
    last = model[-1] if len(model) else None
    if not own and "message" in model.modalities and isinstance(last, Pooling) and last.pooling_mode == "mean":
        model[-1] = Pooling(last.embedding_dimension, "lasttoken")
        logger.info("%s is a plain chat model: its embeddings are those of the last token.", name)


def checkpoint_layers(model: SentenceTransformer) -> None:
    """Let the transformer keep the inputs of its layers alone, and compute each layer again in its backward pass."""
    try:
        model.gradient_checkpointing_enable()
    except ValueError as error:
        raise AnybatchError(f"train.gradient_checkpointing is on: {error} Leave it out.") from error
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise AnybatchError("train.gradient_checkpointing is on, and this model has no layers for it. Leave it out.")


def side_prompt(model: SentenceTransformer, side: Side | None) -> str:
    """What the model puts before a side's texts, as `encode_query` and `encode_document` choose it; "" for nothing."""
    name = next((name for name in NAMES.get(side or "", ()) if name in model.prompts), model.default_prompt_name)
    return (model.prompts.get(name) if name is not None else None) or ""


def side_task(model: SentenceTransformer, side: Side | None) -> str | None:
    """The `task` that leads a side's inputs through the model's own tower (`Router`); None without tasks."""
    from sentence_transformers.base.modules import Router

    if side is None or "task" not in model.get_model_kwargs():
        return None
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if not routers:
        return side
    tasks = {*routers[0].sub_modules, *(task for task, _ in routers[0].route_mappings if task)}
    untold = any(not task for task, _ in routers[0].route_mappings)
    by_modality = untold or {"text", "image", "audio", "video", "message"} & tasks
    task = next((name for name in NAMES[side] if name in tasks), side if by_modality else None)
    if task is None:
        raise AnybatchError(
            f"The model has the routes {', '.join(sorted(tasks))}, and none for a {side}. Name the routes of its "
            "Router 'query' and 'document'."
        )
    return task


def side_inputs(model: SentenceTransformer, inputs: list[Any], side: Side) -> dict[str, Any]:
    """Texts or images of a side as the model's features, prompt and route included, as in the Trainer's collator."""
    from anybatch.integrations.sentence_transformers.collating import preprocess_rows

    task = side_task(model, side)
    features = preprocess_rows(model, inputs, prompt=side_prompt(model, side), task=task)
    return features if task is None else features | {"task": task}


def warn_of_instructions(model: SentenceTransformer, sets: Sequence[PairSet]) -> None:
    """Warn where the model leaves prompts out of its pooling: a data set's instruction is pooled all the same."""
    instructed = [part.name for part in sets if part.anchor_prompt or part.positive_prompt]
    if instructed and any(getattr(module, "include_prompt", True) is False for module in model.modules()):
        logger.warning(
            "The instructions of the data set '%s' are part of its texts, and this model leaves prompts out of its "
            "pooling (include_prompt=False): they are pooled all the same. Use model.anchor_prompt and "
            "model.positive_prompt for what is to be left out.",
            instructed[0],
        )


def lengths_of(model: SentenceTransformer) -> list[Any]:
    """The length that each of the model's input modules (one, or one a route) cuts texts at."""
    return [getattr(module, "max_seq_length", None) for module in _input_modules(model)]


def _input_modules(model: SentenceTransformer) -> list[Any]:
    from sentence_transformers.base.modules import Router

    first: Any = model[0]
    routes = first.sub_modules.values() if isinstance(first, Router) else ()
    return [next(iter(route.children())) for route in routes] or [first]


def _set_length(model: SentenceTransformer, max_length: int, name: str) -> None:
    own = model.max_seq_length
    for module in _input_modules(model):
        if hasattr(module, "max_seq_length"):
            with contextlib.suppress(AttributeError):  # StaticEmbedding has one that cannot be set
                module.max_seq_length = max_length
        if getattr(module, "max_seq_length", None) != max_length:
            raise AnybatchError(
                f"A length of {max_length} tokens was asked for, and a {type(module).__name__} does not cut its "
                "texts. Leave max_length unset."
            )
    if own is not None and own != max_length:
        logger.info(
            "Model %s: texts are cut at %s tokens, not at its own %s, in all that is measured here, and in the model "
            "that is saved. To measure with another limit: anybatch evaluate --max-length.",
            *(name, max_length, own),
        )


def _say_sides(model: SentenceTransformer, name: str, own: dict[str, str]) -> None:
    sides = []
    for side in get_args(Side):
        prompt, task = side_prompt(model, side), side_task(model, side)
        origin = "" if prompt == own[side] else f" (given; its own is {own[side]!r})" if own[side] else " (given)"
        shown = f"with the prompt {prompt!r}" if prompt else "without a prompt"
        readers, route = "queries" if side == "query" else "documents", f", through the route {task!r}" if task else ""
        sides.append(f"{readers} {shown}{origin}{route}")
    used = {side_prompt(model, side) for side in get_args(Side)} | set(own.values())
    unused = [key for key, prompt in model.prompts.items() if prompt and prompt not in used]
    ignored = f"; not used: its prompts {', '.join(map(repr, unused))}" if unused else ""
    if used != {""} or unused or "task" in model.get_model_kwargs():
        logger.info("Model %s reads %s%s.", name, "; ".join(sides), ignored)


def keep_first_layers(model: SentenceTransformer, num_layers: int) -> None:
    """Cut the transformer inside `model` down to its first `num_layers` layers, in place; a saved copy stays cut."""
    from torch import nn

    backbone: Any = model[0].model if hasattr(model[0], "model") else getattr(model[0], "auto_model", None)
    config: Any = getattr(backbone, "config", None)
    total: int = getattr(config, "num_hidden_layers", None) or 0
    stacks = [
        (parent, name)  # of every module that holds it: one that is not cut would run whole
        for parent in (backbone.modules() if total else ())
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == total
    ]
    if len(stacks) != 1:
        raise AnybatchError(
            "model.num_layers needs a transformer with one list of 'num_hidden_layers' layers; this model has "
            f"{len(stacks)}. Leave it unset."
        )
    if not 1 <= num_layers <= total:
        raise AnybatchError(f"model.num_layers is {num_layers}; expected 1 to {total}, the layers of this model.")
    parent, name = stacks[0]
    setattr(parent, name, getattr(parent, name)[:num_layers])
    config.num_hidden_layers = num_layers
