"""Run by test_training_optimizer.py: two replicas on two logical CPUs against one device that gets the summed gradient.

The same steps, bit for bit, eagerly and compiled; a checkpoint that one of them writes is continued by the other.
"""

from __future__ import annotations

import os
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import keras
import numpy as np
import tensorflow as tf

from tfmaskformer.training.optimizer import AdamW
from tfmaskformer.training.recipe import Recipe
from tfmaskformer.training.schedule import build_lr_scheduler

PARAMETERS = [("a.weight", "backbone.weight", 0.1, 0.05), ("b.bias", "sem_seg_head.norm", 1.0, 0.0)]
SHAPES = [(3, 5), (4,)]


def build():
    rng = np.random.default_rng(0)
    variables = [keras.Variable(rng.standard_normal(shape), dtype="float64") for shape in SHAPES]
    schedule = build_lr_scheduler(Recipe(base_lr=0.05, warmup_iters=3, max_iter=20, steps=(6,)))
    optimizer = AdamW(schedule, PARAMETERS, clip_norm=0.01)
    optimizer.build(variables)
    return variables, optimizer


def gradients(step):
    """One list for each replica. They nearly cancel in step 3, where each alone would be clipped and their sum is not."""
    rng = np.random.default_rng(step)
    first, second = ([rng.standard_normal(shape) * 10.0 ** (2 - step % 5) for shape in SHAPES] for _ in range(2))
    if step == 3:
        second = [-values + 1e-4 * other for values, other in zip(first, second, strict=True)]
    return first, second


def state(variables, optimizer):
    slots = [optimizer.slot(slot, name) for slot in optimizer.slots for name, *_ in PARAMETERS]
    return [variable.numpy() for variable in (*variables, *slots, optimizer.gradient_norm, optimizer.iterations)]


def assert_equal(one, other, step):
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left, right, err_msg=f"step {step}")


def main(folder):
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    variables, optimizer = build()
    with strategy.scope():
        mirrored, mirrored_optimizer = build()
    assert len(mirrored[0].value.values) == 2

    @tf.function
    def step_on_replicas(first, second):
        def replica(*values):
            mirrored_optimizer.apply(list(values), mirrored)

        def per_replica(one, other):
            return strategy.experimental_distribute_values_from_function(
                lambda context: one if context.replica_id_in_sync_group == 0 else other
            )

        strategy.run(replica, args=[per_replica(one, other) for one, other in zip(first, second, strict=True)])

    def steps(numbers):
        for step in numbers:
            first, second = ([tf.constant(values) for values in values_of] for values_of in gradients(step))
            step_on_replicas(first, second)
            optimizer.apply([one + other for one, other in zip(first, second, strict=True)], variables)
            found = state(mirrored, mirrored_optimizer)
            assert_equal(state(variables, optimizer), found, step)
            for variable in mirrored:
                assert_equal(*([part.numpy() for part in [value]] for value in variable.value.values), step)

    steps(range(1, 9))
    path = tf.train.Checkpoint(optimizer=mirrored_optimizer).save(os.path.join(folder, "ckpt"))
    tf.train.Checkpoint(optimizer=optimizer).restore(path).assert_consumed()
    steps(range(9, 12))
    print("equal")


if __name__ == "__main__":
    main(sys.argv[1])
