"""Linear assignment: a batch of rectangular problems, exact, at static shapes, on any device.

Shortest augmenting paths with potentials (Jonker & Volgenant 1987; Crouse 2016, "On implementing 2D rectangular assignment
algorithms", which SciPy's ``linear_sum_assignment`` follows too), over real targets only: padding costs no step. All problems
advance together in one bounded loop, each at its own pace. docs/decisions/0003-assignment.md has the reasons and figures.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf


class Assignment(NamedTuple):
    """What :func:`linear_assignment` found.

    Attributes:
        queries: int32 [..., max_objects], the query of each object; −1 for padding, for an object left over because there are
            more objects than queries, and everywhere in a problem that is not valid.
        valid: bool [...], whether the problem had a solution (False exactly where SciPy raises).
    """

    queries: tf.Tensor
    valid: tf.Tensor


def linear_assignment(cost: tf.Tensor, num_objects: tf.Tensor) -> Assignment:
    """Matches objects to queries, one to one, at the least total cost.

    With n objects and Q queries, min(n, Q) pairs are matched. Of several optimal matchings any one is returned, the same one for
    the same input. A cost of +inf forbids a pair. A problem with NaN or −inf among the costs of its real objects, or whose
    matching cannot avoid a forbidden pair, is not valid; the other problems of the batch are unaffected. Costs of padded
    objects are never looked at. Arithmetic is in the cost's dtype; it must hold the sum of the largest costs of two pairs.

    Args:
        cost: float32 or float64 [..., num_queries, max_objects]; these two dimensions are static. No gradient passes.
        num_objects: int32 [...], how many objects are real (the first ones).

    >>> cost = tf.constant([[[4.0, 1.0], [2.0, 0.0], [3.0, 5.0]]])
    >>> linear_assignment(cost, [2]).queries.numpy().tolist()
    [[1, 0]]
    """
    cost = tf.stop_gradient(tf.convert_to_tensor(cost))
    num_queries, max_objects = cost.shape[-2:]
    if num_queries is None or max_objects is None:
        raise ValueError(f"linear_assignment: cost must have static [..., num_queries, max_objects], got {cost.shape}")
    leading = tf.shape(cost)[:-2]
    if max_objects == 0:
        return Assignment(tf.zeros(tf.shape(cost)[:-2], tf.int32)[..., tf.newaxis][..., :0], tf.ones(leading, tf.bool))
    rows = tf.linalg.matrix_transpose(tf.reshape(cost, [-1, num_queries, max_objects]))
    queries, valid = _solve(rows, tf.reshape(num_objects, [-1]))
    return Assignment(tf.reshape(queries, tf.concat([leading, [max_objects]], 0)), tf.reshape(valid, leading))


class _State(NamedTuple):
    """One problem grows a tree of shortest paths from ``root``, or (``sink`` ≥ 0) flips the pairs along the path it found.

    ``potential`` is that of the columns; a matched row's is implied by its pair. ``distance`` and ``parent`` (the row
    before) belong to the paths to each column, ``scanned`` columns are in the tree. ``row`` is to be expanded, reached
    through ``column`` (−1 at the root) at ``reached``. ``root`` is −1 when nothing is left to do.
    """

    root: tf.Tensor
    row: tf.Tensor
    column: tf.Tensor
    reached: tf.Tensor
    sink: tf.Tensor
    distance: tf.Tensor
    parent: tf.Tensor
    scanned: tf.Tensor
    potential: tf.Tensor
    column_of_row: tf.Tensor
    row_of_column: tf.Tensor
    valid: tf.Tensor


def _solve(cost, num_objects):
    """Solves [problems, rows, columns] for the first ``num_objects`` rows: (column of each row, valid)."""
    _, num_rows, num_columns = cost.shape
    real = tf.range(num_rows) < num_objects[:, tf.newaxis]
    bad = tf.math.is_nan(cost) | (cost == -float("inf"))
    valid = ~tf.reduce_any(bad & real[:, :, tf.newaxis], [1, 2])
    if num_rows > num_columns:
        # Where objects outnumber queries, the surplus goes to as many extra columns, all at the same cost: then every object
        # finds a column, and the real columns are shared out at the least cost.
        extra = tf.range(num_rows - num_columns) < num_objects[:, tf.newaxis] - num_columns
        extra = tf.where(extra[:, tf.newaxis, :], tf.zeros([], cost.dtype), tf.constant(float("inf"), cost.dtype))
        extra = tf.broadcast_to(extra, [tf.shape(cost)[0], num_rows, num_rows - num_columns])
        cost = tf.concat([cost, extra], 2)
    column_of_row, valid = _augment(cost, real, valid)
    return tf.where(valid[:, tf.newaxis] & (column_of_row < num_columns), column_of_row, -1), valid


def _augment(cost, real, valid):
    """Matches every real row of [problems, rows, columns] by successive shortest paths: (column of each row or −1, valid)."""
    problems = tf.shape(cost)[0]
    _, num_rows, num_columns = cost.shape
    infinity = tf.constant(float("inf"), cost.dtype)
    rows, columns = tf.range(num_rows), tf.range(num_columns)

    # Start with the pairs that are cheapest for their row and not claimed by an earlier one.
    cheapest = tf.argmin(cost, 2, output_type=tf.int32)
    claims = (cheapest[:, :, tf.newaxis] == columns) & real[:, :, tf.newaxis] & (cost < infinity)
    row_of_column = tf.where(tf.reduce_any(claims, 1), tf.argmax(claims, 1, output_type=tf.int32), -1)
    matched = tf.gather(row_of_column, cheapest, batch_dims=1) == rows
    column_of_row = tf.where(matched, cheapest, -1)

    def next_root(column_of_row, valid):
        free = real & (column_of_row < 0) & valid[:, tf.newaxis]
        return tf.where(tf.reduce_any(free, 1), tf.argmax(free, 1, output_type=tf.int32), -1)

    def at(values, index):
        return tf.gather(values, tf.maximum(index, 0), batch_dims=1)

    def step(state):
        growing = (state.root >= 0) & (state.sink < 0)
        # Grow: one step of Dijkstra's algorithm on reduced costs.
        reduced = at(cost, state.row) - state.potential
        offset = tf.where(state.column < 0, tf.zeros([], cost.dtype), at(reduced, state.column) - state.reached)
        through = reduced - offset[:, tf.newaxis]
        shorter = growing[:, tf.newaxis] & ~state.scanned & (through < state.distance)
        distance = tf.where(shorter, through, state.distance)
        parent = tf.where(shorter, state.row[:, tf.newaxis], state.parent)
        open_distance = tf.where(state.scanned, infinity, distance)
        reached = tf.reduce_min(open_distance, 1)
        # Among the nearest columns a free one ends the search at once.
        nearest = tf.cast(open_distance == reached[:, tf.newaxis], tf.int32)
        column = tf.argmax(nearest * tf.where(state.row_of_column < 0, 2, 1), 1, output_type=tf.int32)
        valid = state.valid & ~(growing & ~(reached < infinity))
        growing &= valid
        owner = at(state.row_of_column, column)
        found = growing & (owner < 0)
        potential = tf.where(found[:, tf.newaxis] & state.scanned, state.potential + (distance - reached[:, tf.newaxis]), state.potential)
        scanned = state.scanned | ((growing & ~found)[:, tf.newaxis] & (columns == column[:, tf.newaxis]))
        # Flip: one pair of the path found.
        sink = tf.where(found, column, state.sink)
        flipping = sink >= 0
        giver = at(parent, sink)
        previous = at(state.column_of_row, giver)
        flipped = flipping[:, tf.newaxis]
        row_of_column = tf.where(flipped & (columns == sink[:, tf.newaxis]), giver[:, tf.newaxis], state.row_of_column)
        column_of_row = tf.where(flipped & (rows == giver[:, tf.newaxis]), sink[:, tf.newaxis], state.column_of_row)
        # Begin anew with the next unmatched row where the path is done.
        done = (flipping & (giver == state.root)) | ~valid
        root = tf.where(done, next_root(column_of_row, valid), state.root)
        return _State(
            root=root,
            row=tf.where(done, root, tf.where(growing & ~found, owner, state.row)),
            column=tf.where(done, -1, tf.where(growing & ~found, column, state.column)),
            reached=tf.where(growing, reached, state.reached),
            sink=tf.where(done, -1, tf.where(flipping, previous, -1)),
            distance=tf.where(done[:, tf.newaxis], infinity, distance),
            parent=parent,
            scanned=scanned & ~done[:, tf.newaxis],
            potential=potential,
            column_of_row=column_of_row,
            row_of_column=row_of_column,
            valid=valid,
        )

    root = next_root(column_of_row, valid)
    nothing = tf.fill([problems], -1)
    empty = tf.zeros([problems, num_columns], cost.dtype)
    state = _State(
        root=root,
        row=root,
        column=nothing,
        reached=tf.zeros([problems], cost.dtype),
        sink=nothing,
        distance=empty + infinity,
        parent=tf.zeros([problems, num_columns], tf.int32),
        scanned=tf.zeros([problems, num_columns], tf.bool),
        potential=empty,
        column_of_row=column_of_row,
        row_of_column=row_of_column,
        valid=valid,
    )
    # A tree that grows from the k-th row scans at most k columns, and its path has at most k pairs (the first flips with the find).
    state = tf.while_loop(
        lambda state: tf.reduce_any(state.root >= 0),
        lambda state: [step(state)],
        [state],
        maximum_iterations=num_rows * (num_rows + 1),
    )[0]
    return state.column_of_row, state.valid & (state.root < 0)
