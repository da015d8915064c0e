"""The DeltaKV compressor (arXiv:2602.08005): keys and values as small residuals against nearby reference tokens.

A token's signal in one layer is x = concat(K before RoPE, V) over all KV heads. It is stored as a latent
`z = down(x) - down(r)`, r being the mean of its K references, and read back as `up(z) + r`. References are tokens that
are kept as they are: the sinks and every `step`-th token after them, called centers.

**Centers and sinks are never compressed**: they are at full precision in the cache anyway, so a latent for them would
cost memory and lose precision. Training and serving both read them as they are (`sparsejax.compressor.geometry`).
"""

from sparsejax.compressor.config import (
    DOWN_UP_TYPES,
    METRICS,
    REFERENCE_KINDS,
    CompressorConfig,
    CompressorConfigError,
    CompressorMismatchError,
)
from sparsejax.compressor.geometry import (
    center_count,
    center_ordinals,
    center_positions,
    is_center,
    latent_count,
    latent_ordinals,
)
from sparsejax.compressor.modules import Compressor, Projection, abstract_params, init_params
from sparsejax.compressor.positional import positional_references
from sparsejax.compressor.reconstruct import reconstruct, references_of
from sparsejax.compressor.search import reference_mean, reference_search, soft_weights
from sparsejax.compressor.store_geometry import StoreGeometry

__all__ = [
    "DOWN_UP_TYPES",
    "METRICS",
    "REFERENCE_KINDS",
    "Compressor",
    "CompressorConfig",
    "CompressorConfigError",
    "CompressorMismatchError",
    "Projection",
    "StoreGeometry",
    "abstract_params",
    "center_count",
    "center_ordinals",
    "center_positions",
    "init_params",
    "is_center",
    "latent_count",
    "latent_ordinals",
    "positional_references",
    "reconstruct",
    "reference_mean",
    "reference_search",
    "references_of",
    "soft_weights",
]
