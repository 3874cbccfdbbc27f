"""The loop around the step: batches, replicas, checkpoints, curves, evaluations, and an end where a training goes wrong.

Source: MaskFormer ``train_net.py`` and Detectron2 ``engine/defaults.py`` (``DefaultTrainer``, with its hooks and their periods). Its state
is what a checkpoint holds, and how many steps were taken: order and draws of the data depend on that number alone, as dropout does. On one
CPU a training that was interrupted is bit for bit the one that was not.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfmaskformer import checkpoint
from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.data.datasets import DataSet
from tfmaskformer.data.training import step_arguments, training_dataset
from tfmaskformer.evaluation.counts import headline
from tfmaskformer.evaluation.devices import gathered, worker
from tfmaskformer.evaluation.evaluate import Evaluation
from tfmaskformer.evaluation.sources import Source, metrics_of
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import named_variables, share_parameters
from tfmaskformer.official_yaml import Tree
from tfmaskformer.training.guard import DivergedError, Guard, Observed
from tfmaskformer.training.optimizer import build_optimizer
from tfmaskformer.training.recipe import Recipe
from tfmaskformer.training.run import Run, RunError
from tfmaskformer.training.step import StepResult, TrainStep
from tfmaskformer.training.summaries import Summaries, sample_overlay

LOG_PERIOD = 20
"""Steps, as upstream. They are looked at together, so that devices need not wait for it after every one."""

_EVALUATION = "evaluation-{}.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained, and how.

    Attributes:
        tree: the whole official config.
        config: of the model that it describes.
        recipe: its optimisation. ``ims_per_batch`` are the images of a step on all replicas, in all parts.
        seed: of order, draws, dropout and random initial values.
        dtype: of the model; "mixed_bfloat16" or "float32".
        parts: see :class:`~tfmaskformer.training.step.TrainStep`.
        rematerialise: the same.
        canvas: height and width in px of all images; None: as :func:`~tfmaskformer.data.training.training_dataset` has it.
        max_objects: of an image; None: as many as the model has queries.
    """

    tree: Tree
    config: MaskFormerConfig
    recipe: Recipe
    seed: int = 0
    dtype: str = "float32"
    parts: int = 1
    rematerialise: bool = False
    canvas: tuple[int, int] | None = None
    max_objects: int | None = None

    def plan(self) -> dict[str, Any]:
        """What is in neither the tree nor the model's config, of JSON types."""
        names = ("seed", "dtype", "parts", "rematerialise", "canvas", "max_objects")
        return json.loads(json.dumps({name: getattr(self, name) for name in names}))


class _Timed(NamedTuple):
    """The step that was taken, what it gave, how many objects were left out, and how long the batch was waited for."""

    step: int
    result: Any
    dropped: Any
    data_s: float


class Training:
    """A model on its devices, its optimizer, and the data that it is trained on.

    Args:
        settings: what to train, and how.
        dataset: to train on.
        strategy: whose replicas share each batch.
        initial: a checkpoint directory to start from, maybe of other classes; None: the official initial distributions.
        validation: what the model is evaluated on, this worker's share; None: no evaluation.

    Raises:
        CheckpointError: ``initial`` is none, or of another model.
        RunError: the images of a step cannot be shared out, a canvas that is too small, initial weights that are not finite.
        DataError: the data set lacks what the config wants.
        EvaluationError: the validation set does not fit the model.
    """

    def __init__(
        self,
        settings: Settings,
        dataset: DataSet,
        strategy: tf.distribute.Strategy,
        *,
        initial: str | None = None,
        validation: Source | None = None,
    ):
        self.settings, self.dataset, self.strategy, self.validation = settings, dataset, strategy, validation
        devices, parts, images = strategy.num_replicas_in_sync, settings.parts, settings.recipe.ims_per_batch
        if images % (devices * parts):
            raise RunError(f"SOLVER.IMS_PER_BATCH is {images}, expected a multiple of {devices * parts}: {devices} devices, {parts} parts")
        self._evaluation: Evaluation | None = None  # kept: compiling takes long, and XLA frees no program
        self._metrics = [] if validation is None else metrics_of(settings.config, validation)
        try:
            self._batches(0)
        except ValueError as error:
            raise RunError(str(error)) from error
        keras.utils.set_random_seed(settings.seed)
        with strategy.scope():
            if initial is None:
                self.model = MaskFormer(settings.config, settings.dtype)
                self.model.build_parameters()
            else:
                self.model = checkpoint.load(initial, settings.dtype, settings.config, new_classes=True)
            self.optimizer = build_optimizer(settings.recipe, self.model)
            self.guard = Guard()
        if bad := self._not_finite():
            raise RunError(f"'{initial}': {_told_of(bad)}\n  start from another --init")
        self._step = TrainStep(
            self.model,
            self.optimizer,
            padding="masked",
            seed=settings.seed,
            parts=settings.parts,
            rematerialise=settings.rematerialise,
        )

    @property
    def steps(self) -> int:
        """That were taken."""
        return int(self.optimizer.iterations.numpy())

    def run(self, run: Run, progress: Callable[[int, dict[str, float]], None] = lambda step, values: None) -> None:
        """Trains to the end, from the last checkpoint in the folder, if there is one.

        Args:
            run: the folder.
            progress: is called every :data:`LOG_PERIOD` steps with the number of steps taken and the means of what was measured.

        Raises:
            DivergedError: the training went wrong. The checkpoints in the folder are from before.
            RunError: the folder cannot be written, or its last checkpoint not be read.
            tf.errors.OpError, OSError: a checkpoint could not be written, or an image not read.
        """
        run.begin()
        manager = run.restore(model=self.model, optimizer=self.optimizer, guard=self.guard)
        recipe, eval_period = self.settings.recipe, self.settings.tree["TEST"]["EVAL_PERIOD"]
        summaries = Summaries(run.path("events") if run.writes else None)
        owed = self.steps and self._due(eval_period, self.steps) and not tf.io.gfile.exists(run.path(_EVALUATION.format(self.steps)))
        if gathered(self.strategy, str(bool(owed)))[0] == "True":  # worker 0 knows: a network disk may show another an old folder
            self._evaluate(run, summaries, self.steps)  # it ended between the two
        batches = self._shared(self._batches(self.steps))
        window: list[_Timed] = []
        good = run.latest
        start_s = time.monotonic()
        for step in range(self.steps + 1, recipe.max_iter + 1):
            waiting_s = time.monotonic()
            batch = next(batches)
            data_s = time.monotonic() - waiting_s
            window.append(_Timed(step, *self._train(batch), data_s))
            save, evaluate = (self._due(period, step) for period in (recipe.checkpoint_period, eval_period))
            if save or evaluate or step % LOG_PERIOD == 0:
                values = self._observe(window, good)
                values["images_per_second"] = len(window) * recipe.ims_per_batch / (time.monotonic() - start_s)
                summaries.scalars(step, values)
                progress(step, values)
                window.clear()
            if save or evaluate:
                self._check_weights(step, good)
                if run.writes:  # the checkpoint last: what comes before it is made again after a kill
                    summaries.picture(step, "sample", self._overlay(batch))
                    manager.save(checkpoint_number=step)
                good = run.path(f"ckpt-{step}")  # the next step waits for the worker that writes it
            if evaluate:
                self._evaluate(run, summaries, step)
            if not window:
                start_s = time.monotonic()

    def _due(self, period: int, step: int) -> bool:
        return step == self.settings.recipe.max_iter or (period > 0 and step % period == 0)

    def _batches(self, start: int) -> tf.data.Dataset:
        """This worker's part of each batch, from step ``start`` on."""
        settings = self.settings
        workers, index = worker(self.strategy)
        return training_dataset(
            settings.tree,
            self.dataset,
            seed=settings.seed,
            batch=settings.recipe.ims_per_batch,
            max_objects=settings.max_objects or settings.config.predictor.num_queries,
            canvas=settings.canvas,
            start=start,
            shard=(index, workers),
        )

    def _shared(self, batches: tf.data.Dataset) -> Iterator[Any]:
        """Each batch, shared out to the replicas of this worker."""
        replicas = self.strategy.num_replicas_in_sync // worker(self.strategy)[0]

        def split(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:  # replicas take elements in turn; a TPU takes no text
            return {name: tf.stack(tf.split(values, replicas)) for name, values in batch.items() if name != "image_id"}

        of_replicas = batches.map(split).unbatch().prefetch(tf.data.AUTOTUNE)
        return iter(self.strategy.distribute_datasets_from_function(lambda context: of_replicas))

    def _train(self, batch: Any) -> tuple[Any, Any]:
        """A step: what it gave, and how many objects were left out, on each replica."""
        return self._compiled({name: values for name, values in batch.items() if name != "dropped"}), batch.get("dropped")

    @functools.cached_property
    def _compiled(self) -> Callable[[Any], Any]:
        def on_replica(tensors: Any) -> StepResult:
            return self._step(*step_arguments(tensors))

        # A TPU compiles whatever runs on it. XLA knows no collectives between several CPUs, which are for tests.
        cpus = self.strategy.num_replicas_in_sync > 1 and not tf.config.get_visible_devices("GPU")
        compiled = not cpus and not isinstance(self.strategy, tf.distribute.TPUStrategy)
        inner = tf.function(on_replica, jit_compile=True, autograph=False) if compiled else on_replica
        return tf.function(lambda tensors: self.strategy.run(inner, args=(tensors,)), autograph=False)

    def _observe(self, window: Sequence[_Timed], good: str | None) -> dict[str, float]:
        """Means of what the steps gave, after the guard has seen them."""
        names = [parameter.name for parameter in self.optimizer.parameters]
        observed, lr = [], 0.0
        for timed in window:
            results = self._local(timed.result)
            finite = np.all([result.finite.numpy() for result in results], axis=0)
            losses = {key: float(loss) for key, loss in results[0].losses.items()}
            bad = [name for name, good in zip(names, finite, strict=True) if not good]
            observed.append(Observed(timed.step, losses, bad, float(results[0].gradient_norm)))
            lr = float(results[0].lr)
        try:
            self.guard.check(observed)
        except DivergedError as error:
            remedy = f"'{good}' is the last good checkpoint" if good else "there is no checkpoint yet"
            raise DivergedError(f"{error}\n  {remedy}; a lower SOLVER.BASE_LR, or a longer warm-up, may help (another --out)") from None
        values = {key: float(np.mean([step.losses[key] for step in observed])) for key in observed[0].losses}
        values |= {"gradient_norm": float(np.mean([step.gradient_norm for step in observed])), "lr": lr}
        values["data_seconds"] = float(np.mean([timed.data_s for timed in window]))
        dropped = [np.sum(values) for timed in window if timed.dropped is not None for values in self._local(timed.dropped)]
        return values | {"dropped_objects": float(np.sum(dropped))}

    def _local(self, values: Any) -> list[Any]:
        """Of each replica of this machine."""
        flat = [self.strategy.experimental_local_results(value) for value in tf.nest.flatten(values)]
        return [tf.nest.pack_sequence_as(values, replica) for replica in zip(*flat, strict=True)]

    def _check_weights(self, step: int, good: str | None) -> None:
        if bad := self._not_finite():
            raise DivergedError(f"step {step}: {_told_of(bad)}\n  the last good checkpoint: {good or 'none'}")

    def _not_finite(self) -> list[str]:
        """Names of variables that hold NaN or infinities."""
        return [name for name, good in zip(named_variables(self.model), self._finite(), strict=True) if not good.numpy()]

    @functools.cached_property
    def _finite(self) -> Callable[[], Any]:
        variables = named_variables(self.model).values()
        return tf.function(lambda: [tf.reduce_all(tf.math.is_finite(variable.value)) for variable in variables])

    def _overlay(self, batch: Any) -> np.ndarray:
        images, sizes, targets = step_arguments(self._local(batch)[0])
        height, width = sizes[0].numpy()
        own = {key: values[0].numpy() for key, values in targets.items()}
        if "masks" in own:
            count = own["num_objects"]
            own = {"labels": own["labels"][:count], "masks": own["masks"][:count, :height, :width]}
        else:
            own = {"sem_seg": own["sem_seg"][:height, :width]}
        return sample_overlay(self.model, images[0, :height, :width].numpy(), own)

    def _evaluate(self, run: Run, summaries: Summaries, step: int) -> None:
        """What the last checkpoint has; all workers have a part in it."""
        if self.validation is None:
            return
        if self._evaluation is None:
            model = MaskFormer(self.settings.config)  # in float32, as it is loaded
            share_parameters(model, self.model)
            self._evaluation = Evaluation(run.folder, self.validation, self.strategy, self._metrics, on_error="skip", model=model)
        evaluation = self._evaluation
        evaluation.forget()
        evaluation.run()
        counts = evaluation.total()
        if not run.writes:
            return
        report = evaluation.report(counts)
        values = {f"evaluation/{name}": value for name, value in headline(report["metrics"]).items()}
        summaries.scalars(step, values)
        run.write(_EVALUATION.format(step), (json.dumps(report, indent=1) + "\n").encode())


def _told_of(bad: Sequence[str]) -> str:
    return f"the weight {bad[0]} is not finite" + (f", nor are {len(bad) - 1} others" if bad[1:] else "")
