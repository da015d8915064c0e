"""Training of DeltaKV compressors: a frozen model, two passes, gradients for the compressor only (docs/training.md)."""
