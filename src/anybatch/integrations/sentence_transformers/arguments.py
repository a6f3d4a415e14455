"""The Trainer's own arguments (`train.args`), with ours: which a run decides itself, and where those are set."""

from __future__ import annotations

from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anybatch.core import distributed
from anybatch.core.configuration import Count, NotNegative, convert, unknown_key
from anybatch.core.errors import AnybatchError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformerTrainingArguments

    from anybatch.integrations.sentence_transformers.batches import PlanBatches
    from anybatch.integrations.sentence_transformers.training import TrainConfig

PATIENCE = "early_stopping_patience"  # of transformers' EarlyStoppingCallback, no argument of the Trainer
CHECKED = (bool, int, NotNegative, bool | None, int | None, float | None)  # types of values that are checked here
_ORDER = "The plan decides which rows share a batch, and their order"
_PUSH = "Give --push NAME: the finished model is pushed, with its card"
_WHEN = "Set train.eval_steps: the run evaluates the held-out data at these steps, and at the end"
# Arguments that a run decides itself, and what to set instead.
DECIDED = {
    "output_dir": "Set output (--output)",
    **dict.fromkeys(("per_device_train_batch_size", "auto_find_batch_size"), "Set batch_size (--batch-size)"),
    "gradient_accumulation_steps": "Set batch_size: the cached step needs the memory of one mini-batch at any batch "
    "size, and gives the exact gradient of the whole batch; accumulation would leave out negatives",
    **dict.fromkeys(("seed", "data_seed", "full_determinism"), "Set seed (--seed)"),
    "num_train_epochs": "Set train.epochs (--epochs)",
    "learning_rate": "Set train.learning_rate (--learning-rate)",
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing"), "Set train.gradient_checkpointing"),
    **dict.fromkeys(("save_strategy", "save_steps"), "Set train.save_steps"),
    **dict.fromkeys(("eval_strategy", "eval_steps"), _WHEN),
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "eval_on_start", "eval_delay"), _WHEN),
    **dict.fromkeys(("per_device_eval_batch_size", "prediction_loss_only", "batch_eval_metrics"), _WHEN),
    **dict.fromkeys(("save_only_model", "ignore_data_skip"), "A killed run has to go on exactly. Leave it out"),
    "resume_from_checkpoint": "Give --resume",
    **dict.fromkeys(("batch_sampler", "multi_dataset_batch_sampler", "train_sampling_strategy"), _ORDER),
    **dict.fromkeys(("dataloader_drop_last", "dataloader_in_order", "accelerator_config"), _ORDER),
    **dict.fromkeys(("prompts", "router_mapping"), "Set model.anchor_prompt and model.positive_prompt"),
    **dict.fromkeys(("remove_unused_columns", "label_names"), "Set data.anchor, data.positive and data.negatives"),
    "use_cpu": "Set model.device (--device)",
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_always_push"), _PUSH),
    "hub_token": "config.yaml would keep it. Log in with `hf auth login`, or set HF_TOKEN",
    "fp16": "Set train.args.bf16=true, which needs no gradient scaler: with one a step whose gradients overflow is "
    "left out, and the loss would have remembered it",
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config"), "The ranks of torchrun share a batch, "
    "each with a whole model. For larger models: model.lora, train.gradient_checkpointing"),
    "label_smoothing_factor": "The loss has no classes to smooth. Leave it out",
    "disable_tqdm": "Progress is shown by anybatch. Leave it out",
}  # fmt: skip


def check_arguments(config: TrainConfig, *, on_cpu: bool = False) -> None:
    """Refuse, before anything is written, what the Trainer would refuse, or what would not do what it says."""
    from transformers.integrations import get_reporting_integration_callbacks

    optimizer_of(config)
    arguments = training_arguments(config, "unused", on_cpu=on_cpu)  # makes no folder
    try:
        for kind in get_reporting_integration_callbacks(arguments.report_to):
            kind()
    except (ValueError, RuntimeError, ImportError) as error:
        raise AnybatchError(
            f"train.args.report_to is {config.args['report_to']!r}: {error} Install what it needs, or leave it out."
        ) from error


def training_arguments(
    config: TrainConfig, output: str | Path, *, batches: PlanBatches | None = None, seed: int = 0, on_cpu: bool = False
) -> SentenceTransformerTrainingArguments:
    """Those of the configuration, with `train.args` over our defaults; prompts and routes are added by `Trainer`.

    Raises:
        AnybatchError: A name in `train.args` that the Trainer does not know, or that a run decides; a bad value.
    """
    from sentence_transformers import SentenceTransformerTrainingArguments

    known = {field.name: field for field in fields(SentenceTransformerTrainingArguments) if field.init}
    given = {name: _valued(known, name, value) for name, value in config.args.items()}
    given.pop(PATIENCE, None)
    world_size, evaluates = distributed.world_size(), config.eval_steps is not None
    tracked = bool(given.get("load_best_model_at_end")) or PATIENCE in config.args
    if tracked and not evaluates:
        name = "load_best_model_at_end" if PATIENCE not in config.args else PATIENCE
        raise AnybatchError(f"train.args.{name} is given, and nothing is evaluated while training. {_WHEN}.")
    ours: dict[str, Any] = {
        "output_dir": str(output),
        "num_train_epochs": config.epochs,
        "learning_rate": config.learning_rate,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": config.eval_steps,
        "save_strategy": "steps",
        # The best model is known where it was evaluated, and has to be there.
        "save_steps": config.eval_steps if given.get("load_best_model_at_end") else config.save_steps,
        "seed": seed,
        "use_cpu": on_cpu,
        "disable_tqdm": True,
    }
    if batches is not None:
        ours["per_device_train_batch_size"] = batches.plans[0].batch_size // world_size
        ours["batch_sampler"] = batches
    defaults: dict[str, Any] = {
        "lr_scheduler_type": "linear",
        "logging_steps": 10,
        "save_total_limit": 3,  # the newest may be cut short, so one more than two
        "ddp_backend": "gloo" if world_size > 1 and on_cpu else None,
        "dataloader_pin_memory": not on_cpu,
        "dataloader_drop_last": world_size > 1,  # batches of a plan are whole; else each rank has a word on it
        "metric_for_best_model": "ndcg@10" if tracked else None,
    }
    if "warmup_ratio" not in given:
        defaults["warmup_steps"] = 0.1  # a number below 1 is a fraction
    try:
        return SentenceTransformerTrainingArguments(**(defaults | given | ours))
    except (TypeError, ValueError, ImportError, KeyError) as error:
        raise AnybatchError(f"train.args cannot be used as given: {error}") from error


def _valued(known: dict[str, Field[Any]], name: str, value: Any) -> Any:
    """The value of one of `train.args`, refused where it has no such name or is not for a run to set."""
    if name in DECIDED:
        raise AnybatchError(f"train.args.{name} is decided by the run. {DECIDED[name]}.")
    if name == PATIENCE:
        return convert(Count, value, f"train.args.{name}")
    if name not in known:
        raise unknown_key(f"train.args.{name}", name, [PATIENCE, *(key for key in known if key not in DECIDED)])
    hint = known[name].type
    hint = {float: NotNegative}.get(hint, hint)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return convert(hint, value, f"train.args.{name}", text=True) if hint in CHECKED else value


def check_best(config: TrainConfig, figures: dict[str, float]) -> None:
    """Refuse a figure to tell the best model by that is none of those of the evaluation."""
    if not config.args.get("load_best_model_at_end") and PATIENCE not in config.args:
        return
    name = str(config.args.get("metric_for_best_model", "ndcg@10"))
    if name.removeprefix("eval_") not in figures:
        raise AnybatchError(
            f"train.args.metric_for_best_model is {name!r}, and the figures of this run are {', '.join(figures)}. Name "
            "one of them."
        )


def optimizer_of(config: TrainConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """Class and arguments of an optimiser that the Trainer does not know by itself; None for its AdamW."""
    if config.optimizer == "adamw":
        return None
    if "optim" in config.args:
        raise AnybatchError(
            f"train.optimizer is '{config.optimizer}', and train.args.optim is given. Leave out one of them."
        )
    try:
        from pytorch_optimizer import LARS
    except ImportError as error:
        raise AnybatchError(
            "train.optimizer is 'lars', which is in the package pytorch_optimizer. Install it with: pip install "
            "'anybatch[vision]'"
        ) from error
    return LARS, {"lr": config.learning_rate, "momentum": 0.9}
