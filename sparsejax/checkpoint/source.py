"""Finds a checkpoint: a folder on disk, or a Hugging Face id that is downloaded or found in the local cache."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparsejax.checkpoint.errors import CheckpointError, CheckpointNotFoundError
from sparsejax.models import ModelConfig, UnsupportedModelError
from sparsejax.models.config import token_ids

MANIFEST = "sparsejax_checkpoint.json"  # written last, so a folder that has it is complete
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_TOKENIZER_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # whose files say everything
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
      folder: where it is.
      kind: "huggingface" (safetensors) or "orbax" (written by `convert_from_hf`).
    """

    folder: Path
    kind: Literal["huggingface", "orbax"]


def resolve(source: str | Path) -> Checkpoint:
    """The checkpoint that a folder or a Hugging Face id means. An id is downloaded unless the cache has it.

    The environment variables of huggingface_hub hold: HF_HUB_OFFLINE, HF_HOME, HF_TOKEN.

    Raises:
      CheckpointNotFoundError: no such folder or id, or offline and not in the cache.
      CheckpointError: a folder that holds no checkpoint.
    """
    folder = find_folder(source)
    if (folder / MANIFEST).is_file():
        return Checkpoint(folder, "orbax")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no checkpoint: it has no config.json.")
    return Checkpoint(folder, "huggingface")


def find_folder(source: str | Path, *, kind: str = "checkpoint") -> Path:
    """The folder that a path or a Hugging Face id means, whatever it holds. An id is downloaded unless cached.

    Args:
      kind: what messages call what is looked for.

    Raises:
      CheckpointNotFoundError: no such folder or id, or offline and not in the cache.
    """
    return _local_folder(source, kind) or _snapshot(str(source), ["*.safetensors", *_TOKENIZER_PATTERNS])


def load_config(checkpoint: Checkpoint) -> ModelConfig:
    """The model's configuration; end-of-text ids of generation_config.json are added to those of config.json."""
    config = read_json(checkpoint.folder / "config.json")
    generation = checkpoint.folder / "generation_config.json"
    if generation.is_file():
        try:
            more = token_ids(read_json(generation), "eos_token_id")
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{generation}: {error}") from error
        config["eos_token_id"] = list(dict.fromkeys((*token_ids(config, "eos_token_id"), *more))) or None
    return ModelConfig.from_hf(config)


def load_tokenizer(source: str | Path) -> Any:
    """The transformers tokenizer of a folder (Hugging Face or Orbax) or Hugging Face id; its weights are not fetched.

    Raises:
      CheckpointNotFoundError: no such folder or id, or offline and not in the cache.
      CheckpointError: there are no tokenizer files that transformers can read.
    """
    folder = _local_folder(source, "tokenizer")
    if folder is None:
        folder = _snapshot(str(source), _TOKENIZER_PATTERNS)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise CheckpointError(
            f"{folder} holds no tokenizer (no tokenizer.json, tokenizer_config.json, tokenizer.model)."
        )
    try:
        # Never a checkpoint's own code: transformers would ask on the terminal whether to run it.
        tokenizer = _tokenizer_class(folder).from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        own = len(tokenizer) - len(tokenizer.get_added_vocab())
        longest = tokenizer.model_max_length
    except Exception as error:  # the tokenizers library raises bare ones, transformers what a broken file leads it to
        hint = " (sparsejax never runs a checkpoint's own code)" if "trust_remote_code" in str(error) else ""
        raise CheckpointError(f"The tokenizer in {folder} cannot be loaded{hint}: {error}") from error
    # A tokenizer.json may list all of its tokens as added; where there is none, the vocabulary is missing.
    is_empty = own <= 0 and not (folder / "tokenizer.json").is_file()
    if is_empty or isinstance(longest, bool) or not isinstance(longest, int | float):
        what = f"model_max_length must be a number, got {longest!r}."
        if is_empty:
            what = "it has no tokens but added ones. Is tokenizer.json or tokenizer.model missing?"
        raise CheckpointError(f"The tokenizer in {folder} cannot be used: {what}")
    return tokenizer


def _tokenizer_class(folder: Path) -> Any:
    """The transformers class that loads a folder's tokenizer. Imported late: it is slow, and token ids need none."""
    config = folder / "tokenizer_config.json"
    named = read_json(config).get("tokenizer_class") if config.is_file() else None
    if named in _GENERIC_TOKENIZERS and (folder / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer  # seconds more: it brings the code of every model, and PyTorch if installed

    return AutoTokenizer


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; a missing or broken file is a CheckpointError that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got a {type(value).__name__}.")
    return value


def _local_folder(source: str | Path, kind: str) -> Path | None:
    """The folder that source names, or None if it can only be a Hugging Face id."""
    if not isinstance(source, str | Path) or not str(source):
        raise CheckpointNotFoundError(f"A {kind} is named by a folder or a Hugging Face id, got {source!r}.")
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointNotFoundError(f"{path} is a file; give the folder that holds the {kind}.")
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        raise CheckpointNotFoundError(f"There is no {kind} folder {source}.")
    return None


def _snapshot(repository: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # Subfolders hold the same weights again in other formats (original/ of the Llama repositories).
        return Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except LocalEntryNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{repository} is neither a folder nor in the local Hugging Face cache, and the hub cannot be reached "
            "(or HF_HUB_OFFLINE is set). Download it first, or give a folder."
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise CheckpointNotFoundError(
            f"{repository} is neither a folder nor a model that the Hugging Face hub lets you download: {error}"
        ) from error
