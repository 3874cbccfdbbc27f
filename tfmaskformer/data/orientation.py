"""The orientation that a camera writes into a JPEG file, in TensorFlow: what :func:`~tfmaskformer.data.preprocessing.decode_image` does by
Pillow, for graphs that serve files.

Sources: Exif 2.32 (JEITA CP-3451), sections 4.5.4 (APP1) and 4.6.4 (tag 0x0112); TIFF 6.0, section 2.
"""

from __future__ import annotations

import tensorflow as tf

_ORIENTATION = 0x0112
_MARKER, _APP1, _START_OF_SCAN = 0xFF, 0xE1, 0xDA
_EXIF = list(b"Exif\0\0")
_MOST_ENTRIES = 1000
"""Of a directory: a damaged file may tell any number."""


def exif_orientation_tf(data: tf.Tensor) -> tf.Tensor:
    """1 … 8, the Exif orientation of a JPEG file; 1 where it tells none, and for other files. string [] → int32 []."""
    values = tf.cast(tf.io.decode_raw(data, tf.uint8), tf.int32)
    length = tf.size(values)
    values = tf.pad(values, [[0, 1]])  # so that there is something to read in an empty file

    def read(place: tf.Tensor, size: int, little: tf.Tensor) -> tf.Tensor:
        """Unsigned integers of ``size`` bytes at places of any shape; what lies behind the end is read there."""
        order = tf.where(little, tf.range(size), tf.range(size)[::-1])
        found = tf.gather(values, tf.clip_by_value(place[..., tf.newaxis] + order, 0, length))
        return tf.reduce_sum(found * tf.bitwise.left_shift(1, 8 * tf.range(size)), -1)

    def is_exif(segment: tf.Tensor) -> tf.Tensor:
        name = tf.gather(values, tf.clip_by_value(segment + 4 + tf.range(6), 0, length))
        return (read(segment + 1, 1, tf.constant(True)) == _APP1) & tf.reduce_all(name == _EXIF)

    def go_on(segment: tf.Tensor) -> tf.Tensor:
        is_segment = (segment + 10 < length) & (read(segment, 1, tf.constant(True)) == _MARKER)
        return is_segment & (read(segment + 1, 1, tf.constant(True)) != _START_OF_SCAN) & ~is_exif(segment)

    # A length counts itself, but not the marker before it.
    [segment] = tf.while_loop(go_on, lambda segment: [segment + 2 + read(segment + 2, 2, tf.constant(False))], [tf.constant(2)])
    header = segment + 10
    little = read(header, 1, tf.constant(True)) == ord("I")
    directory = header + read(header + 4, 4, little)
    entries = directory + 2 + 12 * tf.range(tf.minimum(read(directory, 2, little), _MOST_ENTRIES))
    told = tf.reduce_max(tf.where(read(entries, 2, little) == _ORIENTATION, read(entries + 8, 2, little), 1))
    return tf.where((segment + 10 < length) & is_exif(segment) & (told >= 1) & (told <= 8), told, 1)


def upright_tf(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """``image`` [height, width, channels] as it is to be seen. 1: as it is; 2 … 4: mirrored or turned by 180°; 5 … 8: on its side."""
    image = tf.cond(orientation >= 5, lambda: tf.transpose(image, [1, 0, 2]), lambda: image)
    turned = [tf.reduce_any(orientation == [3, 4, 7, 8]), tf.reduce_any(orientation == [2, 3, 6, 7])]
    return tf.reverse(image, tf.boolean_mask([0, 1], tf.stack(turned)))
