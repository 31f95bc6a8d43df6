"""Upload an exported folder to the hub: private, and only files that are meant to leave."""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from nibble.errors import UnavailableError, UsageError

# Weights in two formats, texts, and what names a tokenizer: no pickles, no state, no logs.
ALLOWED = (
    "*.gguf", "*.safetensors", "model.safetensors.index.json", "adapter_config.json", "config.json",
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja", "certificate.json", "Modelfile", "README.md", "LICENSE*",
)  # fmt: skip


def files_to_push(folder: Path) -> list[Path]:
    """The files of a folder that `push` uploads, by name; links, folders and all else stay."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.is_symlink()
        and any(fnmatch(path.name, pattern) for pattern in ALLOWED)
    ]


def check_repository(name: str) -> None:
    """Refuse what is no owner/name.

    Raises:
        UsageError: It says what is expected.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if name.count("/") != 1:
        raise UsageError("--push expects owner/name", fix="write --push my-name/my-adapter")


def push(files: Sequence[Path], name: str, *, is_public: bool, api: Any = None) -> str:
    """Create the repository if it is not there, and upload the files in one commit.

    Args:
        name: owner/name; it stays as visible as it is where it exists.
        api: Speaks to the hub; None is huggingface_hub's client.

    Returns:
        The address of the repository.

    Raises:
        UnavailableError: If the hub cannot be reached, or refuses.
    """
    api = api or HfApi()
    try:
        address = api.create_repo(name, private=not is_public, exist_ok=True)
        operations = [CommitOperationAdd(path.name, str(path)) for path in files]
        api.create_commit(name, operations, commit_message="Adapter trained with nibble")
    except HfHubHTTPError as error:
        raise UnavailableError(
            f"the hub refuses to take {name}: {error.server_message or error}",
            fix="log in with `hf auth login`, with a token that may write to this owner",
        ) from None
    except Exception as error:  # offline mode, no name service, no route: kinds of two libraries
        raise UnavailableError(
            f"{name} was not uploaded: the hub cannot be reached ({type(error).__name__})",
            fix="go online and run the same command again; the files are kept",
        ) from None
    return str(address)
