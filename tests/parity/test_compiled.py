"""What a run leaves behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import tensorflow as tf

from parity.compiled import compiled


def _custom(graphs):
    """A function whose gradient is custom; it tells the graphs that it was traced in."""

    @tf.custom_gradient
    def custom(x):
        if not tf.executing_eagerly():
            graphs.append(weakref.ref(x.graph))
        return 2 * x, lambda upstream: 3 * upstream

    return custom


def _gradient(function):
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return tape.gradient(y, x)

    return gradient


@pytest.mark.parametrize("mode", ["graph", "xla", "eager"])
def test_a_graph_with_a_custom_gradient_ends_with_its_run(mode):
    graphs = []
    with compiled(_gradient(_custom(graphs)), mode) as run:
        for value in 1.0, 2.0:
            assert run(tf.constant(value)).numpy() == 3
        assert run(tf.constant([1.0, 2.0])).numpy().tolist() == [3, 3]
    assert len(graphs) == (0 if mode == "eager" else 2)
    del run
    gc.collect()
    assert [graph() for graph in graphs] == [None] * len(graphs)


def test_what_others_registered_stays():
    graphs = []
    other = tf.function(lambda x: _custom(graphs)(x))
    with compiled(_gradient(_custom([])), "graph") as run:
        run(tf.constant(1.0))
        other(tf.constant(1.0))
    gc.collect()
    assert graphs[0]() is not None  # else there is nothing that has to be forgotten
    assert _gradient(other)(tf.constant(1.0)).numpy() == 3  # TensorFlow looks it up now
