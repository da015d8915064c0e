"""What is marked to be computed beside other work is the same, and marked once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from lowering import lower_for_h200

from pallas_kernels import beside


def both(x, y):
    chosen = beside(lambda: {"sums": jnp.cumsum(x), "largest": [jnp.argmax(x), y * 2]})
    return chosen, x + y


def test_what_is_computed_is_the_same():
    chosen, total = jax.jit(both)(jnp.arange(4.0), jnp.float32(3.0))
    np.testing.assert_array_equal(chosen["sums"], [0, 1, 3, 6])
    assert [float(x) for x in chosen["largest"]] == [3, 6]
    np.testing.assert_array_equal(total, [3, 4, 5, 6])


def test_on_a_gpu_it_is_one_marked_call():
    text = lower_for_h200(both, jnp.arange(4.0), jnp.float32(3.0))
    marked = [line for line in text.splitlines() if "_xla_stream_annotation" in line]
    assert len(marked) == 1
    assert re.search(r"call @.*inlineable = \"false\".*-> \(tensor<i32>, tensor<f32>, tensor<4xf32>\)", marked[0])
