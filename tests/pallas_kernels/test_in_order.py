"""The barrier passes arrays on in place, and a pool that is read and then written is not copied for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import lower_for_h200

from pallas_kernels import in_order
from pallas_kernels.dispatch import targets_gpu


@pytest.mark.parametrize(
    "choice", [{"implementation": "xla"}, {"implementation": "triton", "interpret": True}], ids=["xla", "interpreted"]
)
def test_arrays_come_out_as_they_went_in(choice):
    tree = ({"pool": jnp.arange(12.0).reshape(3, 4)}, (jnp.arange(3, dtype=jnp.uint16), jnp.int32(7)))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda tree: in_order(tree, **choice))(tree), tree)


def test_an_empty_array_is_refused():
    with pytest.raises(ValueError, match="arrays must have an element each"):
        in_order((jnp.zeros((0, 3)), jnp.ones(2)), implementation="xla")


def test_it_lowers_in_place():
    pool = jax.ShapeDtypeStruct((1 << 16, 32, 128), jnp.bfloat16)
    read = jax.ShapeDtypeStruct((8, 128), jnp.bfloat16)
    text = lower_for_h200(lambda pool, read: in_order((pool, read)), pool, read, donate_argnums=0)
    assert text.count("output_operand_alias<") == 2


@pytest.mark.gpu
@pytest.mark.skipif(not targets_gpu(), reason="needs a GPU")
def test_reading_before_writing_copies_no_pool():
    def update(pool, at):
        """Three rounds of reading slots and writing what was read elsewhere."""
        for shift in range(3):
            pool, read = in_order((pool, pool[at + shift]))
            pool = pool.at[at].set(read * 2.0)
        return pool

    pool = jax.ShapeDtypeStruct((1 << 20, 128), jnp.float32)
    at = jax.ShapeDtypeStruct((8,), jnp.int32)
    analysis = jax.jit(update, donate_argnums=0).lower(pool, at).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 1 << 20
