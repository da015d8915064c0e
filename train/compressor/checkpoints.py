"""Checkpoints of a run: training state and place in the data, written by Orbax in the background."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sparsejax.checkpoint import CheckpointError
from train.compressor.step import TrainState


class Checkpoints:
    """The numbered checkpoints of a run. Close it: that waits for what is being written."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Args: keep: how many are kept, the newest."""
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._folder = folder
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """Steps done by the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
        """Starts to write the state after `step` steps, and where the data stream is; written ones are left."""
        if step != self.latest():
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), data=ocp.args.JsonSave(data)),
            )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state and place in the data after `step` steps; `like` gives shapes, types and shardings."""
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like._asdict()
        )
        try:
            found = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
            )
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointError(
                f"{self._folder / str(step)} cannot be read: {error}. If it is damaged, remove it to go on from the "
                "one before."
            ) from error
        return TrainState(**found["state"]), found["data"]

    def close(self) -> None:
        """Waits for what is being written, then releases the folder."""
        self._manager.wait_until_finished()
        self._manager.close()
