"""Which tokens are centers, see `pallas_kernels.centers`: kernels, training and serving share the arithmetic."""

from pallas_kernels.centers import (
    center_count,
    center_ordinals,
    center_positions,
    is_center,
    latent_count,
    latent_ordinals,
)

__all__ = ["center_count", "center_ordinals", "center_positions", "is_center", "latent_count", "latent_ordinals"]
