"""A whole training run: data, steps, metrics, checkpoints, and the compressor at the end.

OUT/options.json            what the run was started with
OUT/metrics.jsonl, loss.png
OUT/checkpoints/STEP        training state and place in the data (Orbax)
OUT/compressor              the result, or what there is of it at --stop-after, in the published layout
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.checkpoint import load_compressor, load_config, resolve, save_compressor
from sparsejax.checkpoint.source import read_json
from sparsejax.compressor import CompressorConfig, init_params
from sparsejax.compressor.config import kv_dim_of
from sparsejax.errors import InvalidArgumentError, SparsejaxError
from sparsejax.folders import check_can_make
from sparsejax.models import ModelConfig
from train.compressor.checkpoints import Checkpoints
from train.compressor.data import Batches, LocalBatch, Rows, check_tokens
from train.compressor.forward import TwoPass
from train.compressor.frozen import load_frozen, stack_compressor, unstack_compressor
from train.compressor.interrupts import held_back
from train.compressor.log import RunLog, plot_metrics
from train.compressor.options import RESUMABLE, TrainOptions
from train.compressor.placement import Placement
from train.compressor.principal import PRINCIPAL, principal_params, require_linear
from train.compressor.step import StepMetrics, TrainState, init_state, make_train_step

EXPORT_DTYPE = "bfloat16"


class TrainingDivergedError(SparsejaxError, ArithmeticError):
    """A loss or gradient is not finite; the message says which step and where its batch was saved."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run works on.

    Attributes:
      model: Hugging Face folder or id, or a converted folder.
      data: folder of packed rows, see `train.compressor.data.Rows`.
      out: folder of the run.
      compressor: options of `CompressorConfig`, without those that the model decides and `references`, which the model
        type decides.
      options: how to train.
      mesh: see `parse_mesh`.
      init: a compressor to start from, folder or id; "pca": linear projections in closed form (`principal.py`); None:
        random.
      resume: go on from the newest checkpoint in `out`.
      stop_after: steps after which to stop for now, with a checkpoint to resume from.
      progress: show progress bars.
    """

    model: str
    data: Path
    out: Path
    compressor: Mapping[str, Any]
    options: TrainOptions
    mesh: str | None = None
    init: str | None = None
    resume: bool = False
    stop_after: int | None = None
    progress: bool = True


def compressor_config(model: ModelConfig, options: TrainOptions, given: Mapping[str, Any]) -> CompressorConfig:
    """The configuration of a compressor for `model`; the type of training decides the references."""
    references = "e2e" if options.model_type == "e2e" else "cluster"
    return CompressorConfig(num_layers=model.num_layers, kv_dim=kv_dim_of(model), **{**given, "references": references})


def train(run: Run) -> Path:
    """Trains a compressor.

    Returns:
      The folder of the compressor, as it is after the last step taken.

    Raises:
      TrainingDivergedError: a loss that is not finite.
      InvalidArgumentError: options or data that do not fit each other, or an `out` that holds another run.
      CheckpointError, CompressorMismatchError: a model or compressor that cannot be loaded or does not fit.
    """
    options, first = run.options, jax.process_index() == 0
    placement = Placement.make(run.mesh)
    rows = Rows(run.data, length=options.length, documents=options.document_masks)
    _check_folder(run)
    model = load_config(resolve(run.model))
    config = compressor_config(model, options, run.compressor)
    if run.init == PRINCIPAL:
        require_linear(config)
    if rows.length <= config.sink_tokens:
        raise InvalidArgumentError(
            f"length must be above sink_tokens ({config.sink_tokens}), or nothing is compressed; got {rows.length}."
        )
    batches = Batches(
        rows,
        micro_batches=options.accumulation,
        batch=options.batch_size * jax.local_device_count(),
        seed=options.seed,
        process=jax.process_index(),
        processes=jax.process_count(),
    )
    rows_per_step = options.accumulation * options.batch_size * jax.device_count()
    steps = max(1, options.epochs * len(rows) // rows_per_step)
    if options.max_steps is not None:
        steps = options.max_steps
    if not steps and run.init is None:
        raise InvalidArgumentError("max_steps 0 trains nothing: say with init what the compressor is.")
    passes = TwoPass(model, config, placement, jnp.dtype(options.dtype), options.train_on, options.recompute)
    from_data = run.init == PRINCIPAL and not run.resume
    params = None if from_data else _start(run, model, config)
    # What of a new run can be refused has been, before the weights are loaded.
    frozen = load_frozen(run.model, placement, jnp.dtype(options.dtype), progress=run.progress and first)
    if params is None:
        params = principal_params(passes, frozen, rows, progress=run.progress and first)
    # Only now is there a run: what was refused leaves no folder behind.
    checkpoints = _open(run)
    try:
        _record(run, config, steps, rows_per_step, rows.digest())

        def whole(tree: Any) -> Any:
            return jax.tree.map(lambda leaf: placement.put(leaf, placement.whole), tree)

        latest = checkpoints.latest()
        if not steps:
            return _export(run, config, params, model)
        state = whole(init_state(whole(stack_compressor(params)), options, steps))
        if latest is not None:
            state, place = checkpoints.restore(latest, state)
            batches.restore(place)
        loop = _Loop(run, make_train_step(passes, options, steps), frozen, placement, batches, checkpoints, model)
        log = (
            RunLog(
                run.out,
                start=latest or 0,
                steps=steps,
                every=options.log_every,
                tokens_per_step=rows_per_step * rows.length,
                shown=run.progress and first,
            )
            if first
            else None
        )
        try:
            state = loop(state, latest or 0, steps, log)
        finally:
            if log is not None:
                log.close()
    finally:
        checkpoints.close()
    if first:
        plot_metrics(run.out / "metrics.jsonl", run.out / "loss.png")
    return _export(run, config, unstack_compressor(state.params), model)


def _export(run: Run, config: CompressorConfig, params: Any, model: ModelConfig) -> Path:
    """Writes the compressor, by the first process, over what an earlier part of the run left. Returns its folder."""
    folder = run.out / "compressor"
    if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        save_compressor(folder, config, params, model=model, dtype=EXPORT_DTYPE)
    return folder


@dataclass
class _Loop:
    """The steps of a run. Results are read late, so that the host never waits for the step just started."""

    run: Run
    step: Any
    frozen: Any
    placement: Placement
    batches: Batches
    checkpoints: Checkpoints
    model: ModelConfig

    def __call__(self, state: TrainState, done: int, steps: int, log: RunLog | None) -> TrainState:
        interval = self.run.options.save_interval(steps)
        last = min(steps, self.run.stop_after or steps)
        in_flight: deque[tuple[int, StepMetrics, LocalBatch]] = deque()

        def settle(most: int) -> None:
            while len(in_flight) > most:
                number, metrics, batch = in_flight.popleft()
                metrics = jax.device_get(metrics)
                if not (np.isfinite(metrics.loss) and np.isfinite(metrics.gradient_norm)):
                    self._diverged(number, metrics, batch)
                if log is not None:
                    log.step(number, metrics)

        with held_back() as interrupted:
            while done < last:
                batch = next(self.batches)
                check_tokens(batch.tokens, self.model.vocab_size)
                documents = None if batch.documents is None else self.placement.put_batch(batch.documents)
                state, metrics = self.step(state, self.frozen, self.placement.put_batch(batch.tokens), documents)
                done += 1
                in_flight.append((done, metrics, batch))
                settle(2)
                stopping = interrupted()
                if done % interval == 0 or done == last or stopping:
                    # What is saved has been seen to be finite.
                    settle(0)
                    self.checkpoints.save(done, state, self.batches.state())
                if stopping:
                    raise KeyboardInterrupt
        return state

    def _diverged(self, number: int, metrics: StepMetrics, batch: LocalBatch) -> None:
        path = self.run.out / f"diverged_step_{number}_process_{jax.process_index()}.npz"
        if batch.documents is None:
            np.savez(path, tokens=batch.tokens)
        else:
            np.savez(path, tokens=batch.tokens, documents=batch.documents)
        values = ", ".join(f"{name} {float(value):.4g}" for name, value in metrics._asdict().items())
        raise TrainingDivergedError(
            f"Step {number} is not finite ({values}). Its batch is in {path}. Run again in another folder, with a "
            "lower learning rate or another seed; --resume would come to the same step by the same way."
        )


def _start(run: Run, model: ModelConfig, config: CompressorConfig) -> dict[str, Any]:
    """First parameters of the compressor, random or loaded."""
    if run.init is None or run.resume:  # a resumed run takes its own in a moment
        return init_params(config, jax.random.key(run.options.seed))
    loaded, params = load_compressor(run.init, model=model, references=config.references)
    if loaded != config:
        before, after = asdict(loaded), asdict(config)
        differing = ", ".join(
            f"{name} {before[name]!r}, not {after[name]!r}" for name in before if before[name] != after[name]
        )
        raise InvalidArgumentError(
            f"init {run.init} is another compressor than the options ask for: it has {differing}."
        )
    return params


def _check_folder(run: Run) -> None:
    """Raises unless the run's folder is as good as new and can be written, or is one to be resumed."""
    folder = run.out / "checkpoints"
    check_can_make(run.out, name="out")
    if not run.resume and run.out.exists() and any(run.out.iterdir()):
        raise InvalidArgumentError(
            f"{run.out} holds something already; go on with it (--resume) or choose another folder."
        )
    if run.resume and not folder.is_dir():
        raise InvalidArgumentError(f"There is nothing to resume: {folder} does not exist.")


def _open(run: Run) -> Checkpoints:
    """The run's checkpoints, new or to be resumed."""
    folder = run.out / "checkpoints"
    run.out.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder, keep=run.options.keep)
    if run.resume and checkpoints.latest() is None:
        checkpoints.close()
        raise InvalidArgumentError(
            f"There is nothing to resume: {folder} has no complete checkpoint. Remove {run.out} to begin anew."
        )
    return checkpoints


def _record(run: Run, config: CompressorConfig, steps: int, rows_per_step: int, digest: str) -> None:
    """Writes options.json, or checks that a resumed run is the one that was started. digest: of the data."""
    now = {
        "model": run.model,
        "data": str(run.data),
        "data_digest": digest,
        "steps": steps,
        "rows_per_step": rows_per_step,
        "init": run.init,
        "compressor": asdict(config),
        **{name: value for name, value in asdict(run.options).items() if name not in RESUMABLE},
    }
    path = run.out / "options.json"
    if run.resume:
        before, asked = _by_name(read_json(path)), _by_name(json.loads(json.dumps(now)))
        del asked["init"]  # what it began with does not matter any more
        names = [*asked, *(name for name in before.keys() - asked if name.startswith("compressor."))]
        differing = [name for name in names if before.get(name) != asked.get(name)]
        if differing:
            was = ", ".join(f"{name} {before.get(name)!r}, now {asked.get(name)!r}" for name in differing)
            if differing == ["data_digest"]:
                raise InvalidArgumentError(
                    f"{run.data} has other rows than when the run began. Resume it on those, or begin another run."
                )
            raise InvalidArgumentError(f"A resumed run must have the options it was started with; it had {was}.")
    elif jax.process_index() == 0:
        path.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


def _by_name(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run, those of its compressor among them."""
    compressor = {f"compressor.{name}": value for name, value in options.get("compressor", {}).items()}
    return {name: value for name, value in options.items() if name != "compressor"} | compressor
