"""A small random model; its engines share what has been compiled, for their decoders and shapes are equal."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from tiny_engine import CONFIG, ENGINE

from sparsejax import LLM
from sparsejax.models import init_params


@pytest.fixture(scope="session")
def params():
    # Ten times the usual scale: logits far enough apart that rounding does not decide a token.
    return jax.tree.map(lambda x: x if x.ndim == 1 else 10 * x, init_params(CONFIG, jax.random.key(7), jnp.float32))


@pytest.fixture(scope="session")
def make_llm(params) -> Callable[..., LLM]:
    return lambda **engine: LLM.from_params(CONFIG, params, **(ENGINE | engine))
