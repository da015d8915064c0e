"""One engine of the embedded model for all tests that need text: small, and compiled once."""

from __future__ import annotations

import functools

from sparsejax import LLM

ENGINE = {"max_num_seqs": 2, "max_num_batched_tokens": 128, "max_model_len": 1024}
"""Engines of these sizes share what has been compiled, the command line's included."""
OPTIONS = [word for name, value in ENGINE.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@functools.cache
def embedded_llm() -> LLM:
    """Give its engine back idle: other tests use it."""
    return LLM(**ENGINE)
