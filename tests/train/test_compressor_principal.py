"""Compressors in closed form: no linear one loses less of the differences, and training can start from them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressor_cases import COMPRESSOR, MODEL, model_params, one_device, write_model, write_packed

from sparsejax.checkpoint import load_compressor
from sparsejax.compressor import CompressorConfig
from sparsejax.compressor.config import kv_dim_of
from sparsejax.compressor.reconstruct import differences, reconstruct
from sparsejax.errors import InvalidArgumentError
from train.compressor.data import Rows
from train.compressor.forward import TwoPass
from train.compressor.frozen import stack_layers
from train.compressor.options import TrainOptions
from train.compressor.principal import principal_params
from train.compressor.run import Run, train

OPTIONS = TrainOptions(max_steps=1, batch_size=1, dtype="float32", rematerialisation="none", learning_rate=1e-9)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("principal")
    return root, write_model(root / "model"), write_packed(root / "packed")


def passes(**changes):
    config = CompressorConfig(num_layers=MODEL.num_layers, kv_dim=kv_dim_of(MODEL), **{**COMPRESSOR, **changes})
    return TwoPass(MODEL, config, one_device(), jnp.float32)


@pytest.fixture(scope="module")
def seen(folders):
    """The frozen model, the rows looked at, and their signals [L, B, T, F]."""
    frozen = stack_layers(MODEL, model_params(), one_device())
    rows = Rows(folders[2])
    tokens = jnp.asarray(np.stack([rows[index]["tokens"] for index in range(len(rows))]))
    return frozen, rows, passes().teacher_signals(frozen, tokens)


@pytest.mark.parametrize("bias", [False, True])
def test_the_error_is_what_the_smallest_eigenvalues_leave(seen, bias):
    frozen, rows, signals = seen
    two = passes(bias=bias)
    params = principal_params(two, frozen, rows, progress=False)
    for layer in range(MODEL.num_layers):
        d = np.asarray(differences(two.compressor, signals[layer]), np.float64).reshape(-1, two.compressor.kv_dim)
        least = np.linalg.eigvalsh(d.T @ d)[: -two.compressor.kv_compressed_size].sum()
        read = reconstruct(two.compressor, params[f"layers_{layer}"], signals[layer])
        lost = float(np.square(np.asarray(read - signals[layer], np.float64)).sum())
        np.testing.assert_allclose(lost, least, rtol=1e-3)
        assert 0 < lost < np.square(d).sum() / 2


def test_as_many_components_as_numbers_lose_nothing(seen):
    frozen, rows, signals = seen
    two = passes(kv_compressed_size=kv_dim_of(MODEL))
    params = principal_params(two, frozen, rows, progress=False)
    read = reconstruct(two.compressor, params["layers_1"], signals[1])
    np.testing.assert_allclose(read, signals[1], atol=1e-4)


def test_training_starts_from_them(folders, seen):
    root, model, data = folders
    run = Run(
        model=str(model),
        data=data,
        out=root / "run",
        compressor=COMPRESSOR,
        options=OPTIONS,
        mesh="data=1",
        init="pca",
        progress=False,
    )
    trained = load_compressor(train(run))[1]
    expected = principal_params(passes(), *seen[:2], progress=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=4e-3), jax.device_get(trained), expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"down_type": "mlp_swiglu"}, "needs down_type and up_type 'linear'"),
        ({"kv_compressed_size": 64}, "kv_compressed_size of at most 32"),
    ],
)
def test_what_has_no_principal_components_is_refused(folders, changes, words):
    root, model, data = folders
    run = Run(
        model=str(model),
        data=data,
        out=root / f"refused-{next(iter(changes))}",
        compressor={**COMPRESSOR, **changes},
        options=OPTIONS,
        init="pca",
        progress=False,
    )
    with pytest.raises(InvalidArgumentError) as error:
        train(dataclasses.replace(run, mesh="data=1"))
    assert words in str(error.value)
