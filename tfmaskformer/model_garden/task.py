"""The official recipes as experiments, and their task: model, data, step, optimizer and evaluation are those of ``tfmaskformer train``.

The Model Garden has the loop, the devices, the checkpoints and the curves. Importing this module registers an experiment for each official
entry of the zoo, under its name. Source of the protocol: TensorFlow Model Garden 2.20, ``official/core/base_task.py``, ``base_trainer.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from checkpoints import registry
from tfmaskformer import checkpoint
from tfmaskformer.config import ConfigError
from tfmaskformer.data.datasets import DataSet, Sample, open_training_set
from tfmaskformer.data.layouts import LAYOUTS
from tfmaskformer.data.listing import write_file
from tfmaskformer.data.preprocessing import resize_shortest_edge, resized_shape
from tfmaskformer.data.training import step_arguments, training_dataset
from tfmaskformer.evaluation.canvases import Canvas, choose_canvases
from tfmaskformer.evaluation.counts import Counts, headline
from tfmaskformer.evaluation.devices import multiply_in_float32
from tfmaskformer.evaluation.evaluate import infer_step
from tfmaskformer.evaluation.sources import Source, metrics_of, open_source
from tfmaskformer.model import MaskFormer
from tfmaskformer.module import named_variables
from tfmaskformer.official_config import config_of, named_tree
from tfmaskformer.official_yaml import override
from tfmaskformer.static_inference import PanopticSegments
from tfmaskformer.training.cli import _initial
from tfmaskformer.training.loop import LOG_PERIOD, Settings
from tfmaskformer.training.optimizer import TorchOptimizer, build_optimizer
from tfmaskformer.training.recipe import recipe_of
from tfmaskformer.training.run import KEEP, RunError
from tfmaskformer.training.step import TrainStep, build_criterion

INSTALL = """pip install 'tfmaskformer[cpu,model-garden]' 'tensorflow-cpu==2.20.*'
  pip install --no-deps 'tf-models-official==2.20.*' 'tf-keras==2.20.*'
  docs/model_garden.md tells why in two steps"""

try:
    import tf_keras
    from official.core import base_task, exp_factory, task_factory, train_lib
    from official.core import config_definitions as cfg
    from official.modeling import hyperparams
except ImportError as error:
    raise ImportError(f"the Model Garden is not there ({error})\n  {INSTALL}", name=error.name) from error

PLACES = {
    "SEED": "task.train_data.seed",
    "SOLVER.CHECKPOINT_PERIOD": "trainer.checkpoint_interval",
    "SOLVER.IMS_PER_BATCH": "task.train_data.global_batch_size",
    "SOLVER.MAX_ITER": "task.max_iter",
    "TEST.EVAL_PERIOD": "trainer.validation_interval",
}
"""Key of the official config → where an experiment has it. All others are changed in ``task.model.options``."""

_GLOBAL_STEP = "global_step/.ATTRIBUTES/VARIABLE_VALUE"


@dataclasses.dataclass
class ModelConfig(hyperparams.Config):
    """What is trained, and by which recipe.

    Attributes:
        config: a zoo entry, or an official YAML file.
        options: changes of its values, ``[KEY, VALUE, …]``, as behind ``tfmaskformer train``; lists as texts.
        parts: in how many parts a replica takes its images.
        rematerialise: whether blocks are computed again in the backward pass.
    """

    config: str = ""
    options: Sequence[Any] = dataclasses.field(default_factory=list)
    parts: int = 1
    rematerialise: bool = False


@dataclasses.dataclass
class DataConfig(hyperparams.Config):
    """Where the images come from, and how many a step takes.

    Attributes:
        input_path: the folder of all data sets, or the config's; for validation also one of TFRecords.
        global_batch_size: images on all replicas; for validation 0: one on each.
        is_training: whether they are the training images, augmented, without an end.
        seed: of order, draws, dropout and initial values; for training.
        canvas: height and width, px, of all images; None: the smallest that holds what the config makes. For training.
        max_objects: of an image; None: as many as the model has queries. For training.
    """

    input_path: str = ""
    global_batch_size: int = 0
    is_training: bool = True
    seed: int = 0
    canvas: Sequence[int] | None = None
    max_objects: int | None = None


@dataclasses.dataclass
class TaskConfig(cfg.TaskConfig):
    """Of :class:`MaskFormerTask`.

    Attributes:
        init_checkpoint: as ``--init`` of ``tfmaskformer train``: a checkpoint directory, or the weights of a backbone.
        max_iter: the length, in steps, that the learning rate is planned for.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    train_data: DataConfig = dataclasses.field(default_factory=DataConfig)
    validation_data: DataConfig = dataclasses.field(default_factory=lambda: DataConfig(is_training=False))
    max_iter: int = 0


def experiment(config: str) -> cfg.ExperimentConfig:
    """The experiment of a zoo entry, or of an official YAML file.

    Raises:
        ConfigError: there is none, or it has a value that is not supported.
    """
    tree = named_tree(config)[1]
    recipe = recipe_of(tree)
    return cfg.ExperimentConfig(
        task=TaskConfig(
            model=ModelConfig(config=config),
            train_data=DataConfig(global_batch_size=recipe.ims_per_batch, seed=max(tree["SEED"], 0)),
            max_iter=recipe.max_iter,
        ),
        trainer=cfg.TrainerConfig(
            train_steps=recipe.max_iter,
            steps_per_loop=LOG_PERIOD,
            summary_interval=LOG_PERIOD,
            checkpoint_interval=recipe.checkpoint_period,
            validation_interval=max(tree["TEST"]["EVAL_PERIOD"], 0) or recipe.max_iter,  # 0: after the last step, as upstream
            max_to_keep=KEEP,
        ),
        runtime=cfg.RuntimeConfig(enable_xla=True),
        restrictions=["trainer.train_steps <= task.max_iter"],
    )


for _entry in registry.entries():
    exp_factory.register_config_factory(_entry.name)(functools.partial(experiment, _entry.name))


def settings_of(params: TaskConfig) -> Settings:
    """What ``tfmaskformer train`` would be told.

    Raises:
        ConfigError: a config, key or value that there is not, or that has its place elsewhere in an experiment.
        RunError: no data set is known for it.
    """
    name, tree = named_tree(params.model.config)
    options, data = list(params.model.options), params.train_data
    if misplaced := [f"'{key}' is '{PLACES[key]}' here" for key in options[::2] if key in PLACES]:
        raise ConfigError("task.model.options: " + "\n  ".join(misplaced))
    override(tree, [*options, "SOLVER.IMS_PER_BATCH", data.global_batch_size, "SOLVER.MAX_ITER", params.max_iter, "SEED", data.seed])
    config = config_of(tree, name)
    if config.dataset not in LAYOUTS:
        raise RunError(f"DATASETS.TRAIN is {tree['DATASETS']['TRAIN']}, which is no data set known here\n  change it in task.model.options")
    return Settings(
        tree,
        config,
        recipe_of(tree),
        seed=max(data.seed, 0),  # as tfmaskformer train
        parts=params.model.parts,
        rematerialise=params.model.rematerialise,
        canvas=(data.canvas[0], data.canvas[1]) if data.canvas else None,
        max_objects=data.max_objects,
    )


@task_factory.register_task_cls(TaskConfig)
class MaskFormerTask(base_task.Task):
    """A training as ``tfmaskformer train`` has it, for the Model Garden's trainer.

    Args:
        params: a :class:`TaskConfig`.
        logging_dir: the experiment's ``model_dir``, from which the task knows how many batches there were before an interruption. It
            becomes a checkpoint directory for ``tfmaskformer eval`` and ``convert``.
        name: of the task.

    Raises:
        ConfigError, RunError: as :func:`settings_of`. Its methods raise these too, DataError and CheckpointError, before a step is taken.
    """

    def __init__(self, params: TaskConfig, logging_dir: str | None = None, name: str | None = None):
        super().__init__(params, logging_dir=logging_dir, name=name)
        self.settings = settings_of(params)

    @functools.cached_property
    def dataset(self) -> DataSet:
        """To train on."""
        return open_training_set(self.settings.config.dataset, self._folder("train_data"))

    @functools.cached_property
    def source(self) -> Source:
        """To evaluate on; all workers take the whole."""
        return open_source(self._folder("validation_data"), self.settings.config.dataset)

    @functools.cached_property
    def metrics(self) -> tuple[str, ...]:
        """By which results are judged."""
        return metrics_of(self.settings.config, self.source)

    @functools.cached_property
    def canvas(self) -> Canvas:
        """Of all images that are evaluated."""
        test = self.settings.config.test
        sizes = [(*resized_shape(*size, test.min_size, test.max_size), *size) for size in self.source.sizes()]
        return choose_canvases(sizes, most=1)[0]

    @functools.cached_property
    def _awaited(self) -> dict[int, Sample]:
        """Number → what was given to the devices and has not been counted."""
        return {}

    def _folder(self, data: str) -> str:
        folder = getattr(self.task_config, data).input_path
        if not folder:
            raise RunError(f"task.{data}.input_path is empty, expected the folder of the data sets")
        return folder

    def build_model(self) -> MaskFormer:
        """The model at random weights, which :meth:`initialize` or a checkpoint replaces; in ``runtime.mixed_precision_dtype``."""
        multiply_in_float32()
        if self._steps_taken() and checkpoint.read_config(self.logging_dir) != self.settings.config:
            raise RunError(f"'{self.logging_dir}' holds a training of another model\n  choose another model_dir")
        keras.utils.set_random_seed(self.settings.seed)
        self._model = MaskFormer(self.settings.config, tf_keras.mixed_precision.global_policy().name)
        self._model.build_parameters()
        return self._model

    def create_optimizer(self, optimizer_config: Any, runtime_config: Any = None) -> TorchOptimizer:
        """The official optimizer for the model that was built last, with groups, schedule and clipping.

        Raises:
            ConfigError: ``trainer.optimizer_config`` has another, or the model is not in ``runtime.mixed_precision_dtype``.
        """
        if optimizer_config.as_dict() != cfg.OptimizationConfig().as_dict():
            raise ConfigError("trainer.optimizer_config is not read: the optimizer is the recipe's\n  change SOLVER in task.model.options")
        dtype = runtime_config and runtime_config.mixed_precision_dtype
        if dtype and dtype != self._model.compute_dtype:
            told = f"runtime.mixed_precision_dtype is '{dtype}', and the model computes in {self._model.compute_dtype}"
            raise ConfigError(f"{told}\n  official.modeling.performance.set_mixed_precision_policy('{dtype}') comes before it")
        return build_optimizer(self.settings.recipe, self._model)

    def initialize(self, model: MaskFormer) -> None:
        """Gives a model without a checkpoint its first weights, and tells in ``model_dir`` which model it is.

        Raises:
            RunError: there is a checkpoint in ``model_dir``, so that this is a worker but the first, without :class:`Runner`.
        """
        if self._steps_taken():
            raise RunError("run_experiment does not read the checkpoint on this worker\n  tfmaskformer.model_garden.task.Runner does")
        if given := self.task_config.init_checkpoint:
            with tempfile.TemporaryDirectory() as scratch:
                loaded = checkpoint.load(_initial(given, model.config, self.settings.seed, scratch), config=model.config, new_classes=True)
            values = named_variables(loaded)
            for name, variable in named_variables(model).items():
                variable.assign(values[name].numpy())
        if tf.distribute.get_strategy().extended.should_checkpoint:
            text = json.dumps(model.config.to_dict(), indent=1) + "\n"
            write_file(os.path.join(self.logging_dir, checkpoint.CONFIG_FILE), text.encode())

    def _steps_taken(self) -> int:
        if not self.logging_dir:
            raise RunError("the task has no logging_dir, expected the model_dir: get_task(params.task, logging_dir=model_dir)")
        prefix = tf.train.latest_checkpoint(self.logging_dir)
        if prefix is None:
            return 0
        reader = tf.train.load_checkpoint(prefix)
        if not reader.has_tensor(_GLOBAL_STEP):
            raise RunError(f"'{self.logging_dir}' holds a checkpoint that is not the Model Garden's\n  choose another model_dir")
        return int(reader.get_tensor(_GLOBAL_STEP))

    def build_inputs(self, params: DataConfig, input_context: tf.distribute.InputContext | None = None) -> tf.data.Dataset:
        """Batches of one replica; in training those that follow the ones which a checkpoint in ``model_dir`` has seen."""
        context = input_context or tf.distribute.InputContext()
        return self._batches(params, context) if params.is_training else self._images(params, context)

    def _batches(self, params: DataConfig, context: tf.distribute.InputContext) -> tf.data.Dataset:
        settings, batch, replicas = self.settings, params.global_batch_size, context.num_replicas_in_sync
        if batch % (replicas * settings.parts):
            expected = f"a multiple of {replicas * settings.parts}: {replicas} replicas, {settings.parts} parts"
            raise RunError(f"task.train_data.global_batch_size is {batch}, expected {expected}")
        batches = training_dataset(
            settings.tree,
            self.dataset,
            seed=settings.seed,
            batch=batch,
            max_objects=settings.max_objects or settings.config.predictor.num_queries,
            canvas=settings.canvas,
            start=self._steps_taken(),
            shard=(context.input_pipeline_id, context.num_input_pipelines),
        )
        numbers = batches.map(lambda batch: {name: values for name, values in batch.items() if name != "image_id"})  # a TPU takes no text
        return numbers.rebatch(batch // replicas, drop_remainder=True).prefetch(tf.data.AUTOTUNE)

    def _images(self, params: DataConfig, context: tf.distribute.InputContext) -> tf.data.Dataset:
        """Every image once; behind the last, as many blank ones, number −1, as it takes to fill the last step."""
        source, test, (height, width, *output) = self.source, self.settings.config.test, self.canvas
        batch = max(params.global_batch_size // context.num_replicas_in_sync, 1)
        step = batch * context.num_replicas_in_sync // context.num_input_pipelines

        def element(number: int, image: np.ndarray, output_size: Sequence[int]) -> dict[str, Any]:
            room = [[0, most - side] for most, side in zip((height, width), image.shape[:2], strict=True)]
            return {"number": number, "image": np.pad(image, [*room, [0, 0]]), "size": image.shape[:2], "output_size": output_size}

        def elements():
            self._awaited.clear()
            number = 0
            for item in source.items(()):
                _, sample, _ = source.load(item)
                if sample is not None:
                    self._awaited[number] = sample
                    image = resize_shortest_edge(sample.image, test.min_size, test.max_size)
                    yield element(number, image, sample.image.shape[:2])
                    number += 1
            for _ in range(-number % step):
                yield element(-1, np.zeros([height, width, 3], np.uint8), output)

        pair = tf.TensorSpec([2], tf.int32)
        image = tf.TensorSpec([height, width, 3], tf.uint8)
        signature = {"number": tf.TensorSpec([], tf.int32), "image": image, "size": pair, "output_size": pair}
        return tf.data.Dataset.from_generator(elements, output_signature=signature).batch(batch, drop_remainder=True).prefetch(1)

    def build_losses(self, labels: Mapping[str, tf.Tensor], model_outputs: Mapping[str, Any], aux_losses: Any = None) -> tf.Tensor:
        """The sum of all weighted losses. :meth:`train_step` has it from the step, with each of them."""
        criterion = build_criterion(self.settings.config)
        found = criterion(model_outputs, labels)
        return criterion.weighted_total(found if isinstance(found, dict) else found[0])

    def build_metrics(self, training: bool = True) -> list[Any]:
        """In training, of a loop's steps: means of each loss, by its official key, and of the gradient's norm; objects left out."""
        if not training:
            return []
        config = self.settings.config
        metrics = [tf_keras.metrics.Mean(name) for name in (*build_criterion(config).weights, "gradient_norm")]
        return metrics + ([tf_keras.metrics.Sum("dropped_objects")] if config.head == "MaskFormerHead" else [])

    @tf.autograph.experimental.do_not_convert
    def train_step(
        self, inputs: Mapping[str, tf.Tensor], model: MaskFormer, optimizer: TorchOptimizer, metrics: Any = None
    ) -> dict[str, Any]:
        """:class:`~tfmaskformer.training.step.TrainStep` on one replica; the losses that it logs are those of all replicas."""
        settings, numbers = self.settings, dict(inputs)
        dropped = numbers.pop("dropped", 0)
        step = TrainStep(model, optimizer, padding="masked", seed=settings.seed, parts=settings.parts, rematerialise=settings.rematerialise)
        result = step(*step_arguments(numbers))
        values = result.losses | {"gradient_norm": result.gradient_norm, "dropped_objects": dropped}
        for metric in metrics or []:
            metric.update_state(values[metric.name])
        return {self.loss: result.losses["total_loss"], **values}

    @tf.autograph.experimental.do_not_convert
    def validation_step(self, inputs: Mapping[str, tf.Tensor], model: MaskFormer, metrics: Any = None) -> dict[str, Any]:
        """What is found in the images of one replica; there is no loss, as upstream."""
        panoptic, labels = infer_step(model, self.metrics)(inputs["image"], inputs["size"], inputs["output_size"], self.canvas[2:])
        found = {"number": inputs["number"], "output_size": inputs["output_size"], "panoptic": panoptic, "labels": labels}
        return {name: value for name, value in found.items() if value is not None}

    def aggregate_logs(self, state: Counts | None, step_logs: Mapping[str, Any]) -> Counts:
        """Counts what :meth:`validation_step` found on each replica."""
        counts = state or Counts.none(self.metrics, self.source.info)
        for replica, numbers in enumerate(step_logs["number"]):
            sizes = step_logs["output_size"][replica].numpy()
            if counts.panoptic is not None:
                segments = PanopticSegments(*(values[replica] for values in step_logs["panoptic"])).images(sizes)
            for index, number in enumerate(numbers.numpy().tolist()):
                if number < 0:
                    continue
                sample: Any = self._awaited.pop(number)
                if counts.panoptic is not None:
                    counts.panoptic.update(sample.panoptic_seg, sample.segments_info, *segments[index])
                if counts.semantic is not None:
                    height, width = sizes[index]
                    counts.semantic.update(sample.sem_seg, step_logs["labels"][replica][index, :height, :width].numpy())
                counts.done.append(str(sample.record.image_id))
        return counts

    def reduce_aggregated_logs(self, aggregated_logs: Counts, global_step: Any = None) -> dict[str, float]:
        """``PQ`` and ``mIoU``, or one of them, in percent, and how many images could not be read."""
        skipped = self.source.images - len(aggregated_logs.done)
        return headline(aggregated_logs.metrics(self.source.info)) | {"skipped_images": float(skipped)}


class Runner(train_lib.OrbitExperimentRunner):
    """The Model Garden's, with which several workers can go on: each but the first looks for checkpoints in a temporary folder there."""

    def _maybe_build_checkpoint_manager(self) -> tf.train.CheckpointManager:
        manager = super()._maybe_build_checkpoint_manager()
        if not self.strategy.extended.should_checkpoint:
            of_first = tf.train.CheckpointManager(self.trainer.checkpoint, self.model_dir, None, init_fn=self.trainer.initialize)
            manager.restore_or_initialize = of_first.restore_or_initialize
        return manager
