"""Run by test_training_step.py: a step on two replicas on two logical CPUs, against what upstream makes of two processes.

Each takes the weighted mean of its own cross-entropies; the mask losses are divided by the number of masks, averaged over both. One replica
that takes the batch in two parts does the same.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import tensorflow as tf

from tests.tfmaskformer import test_training_step as common
from tfmaskformer.training.optimizer import global_norm


def main():
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
    images, sizes, targets = common.batch(counts=(3, 1), height=33, width=35)
    one = common.build(common.QUIET)
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        strategy = tf.distribute.get_strategy()
        mirrored = common.build(common.QUIET)
    parts = common.build(common.QUIET, parts=2)

    def part(index):
        return tf.nest.map_structure(lambda tensor: tensor[index : index + 1], (images, sizes, targets))

    counts, losses, gradients = targets["num_objects"].numpy(), [], []
    for index in range(2):
        own_images, own_sizes, own_targets = part(index)
        factor = counts[index] / counts.mean()  # upstream divides by the mean, the step alone by its own
        with tf.GradientTape() as tape:
            found, _ = one.criterion(one.model(own_images, own_sizes), own_targets)
            found = {key: one.criterion.weights[key] * loss * (1 if key.startswith("loss_ce") else factor) for key, loss in found.items()}
            total = tf.add_n(list(found.values()))
        gradients.append(tape.gradient(total, [variable.value for variable in one.variables]))
        losses.append({key: float(loss) for key, loss in (found | {"total_loss": total}).items()})
    mean = [(first + second) / 2 for first, second in zip(*gradients, strict=True)]

    arguments = [part(0), part(1)]

    def per_replica(first, second):
        return strategy.experimental_distribute_values_from_function(lambda context: (first, second)[context.replica_id_in_sync_group])

    given = tf.nest.map_structure(per_replica, *arguments)
    result = tf.function(lambda *values: strategy.run(mirrored, args=values))(*given)
    for replica in range(2):
        found = tf.nest.map_structure(lambda value, replica=replica: strategy.experimental_local_results(value)[replica].numpy(), result)
        for key in losses[0]:
            np.testing.assert_allclose(found.losses[key], (losses[0][key] + losses[1][key]) / 2, rtol=1e-11, err_msg=key)
        np.testing.assert_allclose(found.gradient_norm, global_norm(mean), rtol=1e-10)
    whole, _ = one.criterion(one.model(images, sizes), targets)  # of one replica
    for key, loss in whole.items():
        same = abs(one.criterion.weights[key] * float(loss) / ((losses[0][key] + losses[1][key]) / 2) - 1) < 1e-10
        assert same != key.startswith("loss_ce"), key
    in_parts = tf.function(parts)(images, sizes, targets)  # of one replica
    for key, loss in in_parts.losses.items():
        np.testing.assert_allclose(loss, (losses[0][key] + losses[1][key]) / 2, rtol=1e-11, err_msg=key)
    np.testing.assert_allclose(in_parts.gradient_norm, global_norm(mean), rtol=1e-10)
    one.apply(mean)
    for variable, other in zip(one.variables, mirrored.variables, strict=True):
        for value in other.value.values:
            np.testing.assert_allclose(value.numpy(), variable.numpy(), rtol=1e-9, atol=1e-12)
    print("equal")


if __name__ == "__main__":
    main()
