"""Set before JAX starts: the suite compiles hundreds of tiny programs, and optimising them costs more than it saves."""

import os
import shutil

if "XLA_FLAGS" not in os.environ and shutil.which("nvidia-smi") is None:
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
