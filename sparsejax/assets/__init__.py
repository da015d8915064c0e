"""Files shipped with the package: the embedded tiny model."""

from pathlib import Path


def tiny_model_path() -> Path:
    """Folder of the embedded model, in Hugging Face layout (config, tokenizer, bf16 safetensors, model card)."""
    return Path(__file__).parent / "tiny"
