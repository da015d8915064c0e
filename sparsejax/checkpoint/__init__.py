"""Checkpoints: Hugging Face safetensors to device parameters, and to and from Orbax folders."""

from sparsejax.checkpoint.compressor import load_compressor, read_compressor_config, save_compressor
from sparsejax.checkpoint.convert import convert_from_hf, convert_to_hf
from sparsejax.checkpoint.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    OutputExistsError,
    TensorMismatchError,
)
from sparsejax.checkpoint.load import load_model, stored_dtype
from sparsejax.checkpoint.source import Checkpoint, load_config, load_tokenizer, resolve

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointNotFoundError",
    "OutputExistsError",
    "TensorMismatchError",
    "convert_from_hf",
    "convert_to_hf",
    "load_compressor",
    "load_config",
    "load_model",
    "load_tokenizer",
    "read_compressor_config",
    "resolve",
    "save_compressor",
    "stored_dtype",
]
