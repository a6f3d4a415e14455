"""Load a sentence-transformers model, whole or only its first layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from anybatch.errors import AnybatchError
from anybatch.files import CONTENTS, flaw_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which encoder, and how much of it.

    Attributes:
        name: A folder, or a name on the Hugging Face hub; None where no model is loaded, as in mining.
        num_layers: Keep only the first layers of the transformer (a fast student); None keeps all.
        max_length: Tokens a text is cut at; None keeps the model's own limit.
        anchor_prompt: Text put before each anchor (an instruction, with its final space).
        positive_prompt: Text put before each positive and negative.
        device: Where it runs; None chooses a GPU if there is one.
    """

    name: str | None = None
    num_layers: int | None = None
    max_length: int | None = None
    anchor_prompt: str = ""
    positive_prompt: str = ""
    device: Literal["cpu", "cuda", "mps"] | None = None


def load_model(config: ModelConfig) -> SentenceTransformer:
    """Load `config.name`, keep `config.num_layers` layers, set the length.

    Raises:
        AnybatchError: No name; the model cannot be found or loaded; it has no list of layers to cut; too few layers.
    """
    from sentence_transformers import SentenceTransformer

    if config.name is None:
        raise AnybatchError("Missing configuration value: model.name (--model), the model to train.")
    if (Path(config.name) / CONTENTS).exists():
        flaw = flaw_of(Path(config.name))
        if flaw is not None:
            raise AnybatchError(
                f"{config.name} {flaw}. If you changed it yourself, delete {CONTENTS} there; else bring back the files that were saved."
            )
    try:
        model = SentenceTransformer(config.name, device=config.device)
    except (OSError, ValueError, KeyError) as error:
        raise AnybatchError(
            f"Cannot load the model {config.name!r}: {str(error).splitlines()[0]}. Expected the folder of a sentence-transformers model, "
            "or a hub name that this machine can reach."
        ) from error
    if config.num_layers is not None:
        keep_first_layers(model, config.num_layers)
    if config.max_length is not None:
        if config.max_length < 2:
            raise AnybatchError(f"model.max_length is {config.max_length}; expected at least 2 tokens.")
        model.max_seq_length = config.max_length
    return model


def keep_first_layers(model: SentenceTransformer, num_layers: int) -> None:
    """Cut the transformer inside `model` down to its first `num_layers` layers, in place; a saved copy stays cut.

    Raises:
        AnybatchError: `num_layers` is not between 1 and the number of layers, or the layers cannot be found.
    """
    from torch import nn

    backbone: Any = model[0].model if hasattr(model[0], "model") else getattr(model[0], "auto_model", None)
    config: Any = getattr(backbone, "config", None)
    total = getattr(config, "num_hidden_layers", None)
    if backbone is None or total is None:
        raise AnybatchError(
            "model.num_layers needs a transformer with a 'num_hidden_layers' setting; this model has none. Leave it unset."
        )
    if not 1 <= num_layers <= total:
        raise AnybatchError(
            f"model.num_layers is {num_layers}; expected 1 to {total}, the number of layers of this model."
        )
    stacks = [
        (parent, name)
        for parent in backbone.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == total
    ]
    if len(stacks) != 1:
        raise AnybatchError(
            f"Found {len(stacks)} stacks of {total} layers in this model, expected one. Leave model.num_layers unset."
        )
    parent, name = stacks[0]
    setattr(parent, name, getattr(parent, name)[:num_layers])
    config.num_hidden_layers = num_layers
