"""Outputs reach the host as they left the device, whatever their types, and as one array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.engine.programs.readback import Readback
from sparsejax.engine.programs.sampling import SampleOutput


def test_a_tree_comes_back_as_it_was():
    tree = {
        "sample": SampleOutput(token=jnp.array([3, -1], jnp.int32)),
        "ok": jnp.array(True),
        "flags": jnp.array([[True, False, True]]),
        "seeds": jnp.array([0, 2**32 - 1], jnp.uint32),
        "scores": jnp.array([[-0.0, jnp.inf], [1e-40, 3.5]], jnp.float32),
        "none": None,
        "empty": jnp.zeros((0, 4), jnp.float32),
    }
    packed = jax.jit(Readback.of)(tree)
    assert len(jax.tree.leaves(packed)) == 1
    got = packed.get()
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    for found, expected in zip(jax.tree.leaves(got), jax.tree.leaves(tree), strict=True):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(found.view(np.uint8), np.asarray(expected).view(np.uint8))


def test_a_tree_of_nothing():
    assert jax.jit(lambda: Readback.of({"none": None}))().get() == {"none": None}


def test_other_sizes_are_refused():
    with pytest.raises(TypeError, match="bfloat16"):
        Readback.of(jnp.zeros(2, jnp.bfloat16))
