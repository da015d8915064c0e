"""Files shipped with the package: the embedded tiny model and its DeltaKV compressor."""

from pathlib import Path


def tiny_model_path() -> Path:
    """Folder of the embedded model, in Hugging Face layout (config, tokenizer, bf16 safetensors, model card)."""
    return Path(__file__).parent / "tiny"


def tiny_compressor_path() -> Path:
    """Folder of the embedded model's compressor, in the published layout; docs/training.md says how it was made."""
    return Path(__file__).parent / "tiny_compressor"
