"""Low-rank adapters by peft: added to a model before training, merged into its weights when it is saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from anybatch.core.errors import AnybatchError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def add_lora(model: SentenceTransformer, settings: dict[str, Any]) -> None:
    """Add adapters with these settings of peft's `LoraConfig` to the transformer of `model`, in place: it is frozen,
    they are trained, as its other modules are (a projection, say). They begin with the same weights at every call.

    Raises:
        AnybatchError: What peft does not accept, or finds no layers for.
    """
    from peft import LoraConfig

    try:
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(0)
            model.add_adapter(LoraConfig(**settings))
    except Exception as error:  # peft and transformers raise nearly anything for a setting they do not accept
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise AnybatchError(
            f"model.lora is {settings}, and peft says: {reason}. Expected settings of peft's LoraConfig, such as "
            "{r: 8, target_modules: [q_proj, v_proj]}."
        ) from error
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # in bfloat16, steps of a small learning rate would be rounded away
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def merge_lora(model: SentenceTransformer) -> None:
    """Add what the adapters learned to the weights, in place and rounded to their type, and remove the adapters."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper
    except ImportError:
        return
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, BaseTunerLayer) and not isinstance(parent, AuxiliaryTrainingWrapper):
                layer.merge()
                setattr(parent, name, layer.get_base_layer())
            elif isinstance(layer, AuxiliaryTrainingWrapper):  # modules_to_save, trainable_token_indices
                trained = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
                setattr(parent, name, trained)
    transformer: Any = model.transformers_model
    if getattr(transformer, "_hf_peft_config_loaded", False):
        transformer._hf_peft_config_loaded = False
        del transformer.peft_config
