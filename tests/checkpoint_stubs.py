"""Folders that look like checkpoints as far as their config goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsejax.assets import tiny_model_path


def write_config(folder: Path, **changes: Any) -> Path:
    """A folder with the embedded model's config, changed, and no weights."""
    folder.mkdir()
    config = json.loads((tiny_model_path() / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder
