"""Push the model of a finished run to the Hugging Face hub, with its card."""

from __future__ import annotations

from pathlib import Path

from anybatch.core.errors import AnybatchError
from anybatch.run.config import RunConfig

LOGIN = "Log in with `hf auth login`, or set HF_TOKEN"


def check_push(name: str) -> None:
    """Refuse, before the run, a name that the hub would not take, and a machine that is not logged in."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError as error:
        raise AnybatchError(f"--push is {name!r}, which is no name of a model on the hub: {error}") from error
    if get_token() is None:
        raise AnybatchError(f"--push {name} needs an account of the Hugging Face hub. {LOGIN}, then run again.")


def push_model(config: RunConfig, name: str) -> str:
    """Push `model/` of the run, with its card, as `name`; returns the address. What the run left stays as it is.

    `train.args.hub_private_repo` makes a new model private, `train.args.hub_revision` names a branch.

    Raises:
        AnybatchError: The hub cannot be reached, or refuses: with the command that tries again.
    """
    from sentence_transformers import SentenceTransformer

    folder, settings = Path(config.output), config.train.args
    try:
        model = SentenceTransformer(str(folder / "model"), device="cpu")
        return model.push_to_hub(
            name,
            private=settings.get("hub_private_repo"),
            revision=settings.get("hub_revision"),
            exist_ok=True,
            replace_model_card=True,
        )
    except Exception as error:  # of the connection, the name, the account: `huggingface_hub` has many
        raise AnybatchError(
            f"The run is finished, its model is {folder / 'model'}; pushing it to {name} failed "
            f"({next(iter(str(error).splitlines()), type(error).__name__)}). {LOGIN}, check the connection, then try "
            f"again: anybatch train --resume --output {folder} --push {name}"
        ) from error
