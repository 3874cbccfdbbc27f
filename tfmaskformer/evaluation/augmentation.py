"""Semantic segmentation with test-time augmentation: scores of several sizes and of the mirrored image, averaged.

As MaskFormer's ``SemanticSegmentorWithTTA`` (mask_former/test_time_augmentation.py) on Detectron2's ``DatasetMapperTTA``. Upstream there is
none for panoptic results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.data.preprocessing import resize_shortest_edge, resized_shape


class Augmentation(NamedTuple):
    """``TEST.AUG`` of an official config.

    Attributes:
        min_sizes: lengths of the shorter side, px.
        max_size: of the longer side, at most, px.
        flip: whether each size is also seen mirrored.
    """

    min_sizes: tuple[int, ...] = (400, 500, 600, 700, 800, 900, 1000, 1100, 1200)
    max_size: int = 4000
    flip: bool = True

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """(height, width) of what :func:`augmented_images` gives of an image of this size, px."""
        sizes = [resized_shape(height, width, min_size, self.max_size) for min_size in self.min_sizes]
        return [size for size in sizes for _ in range(1 + self.flip)]


OFFICIAL = {
    ("ade20k", 512): Augmentation((256, 384, 512, 640, 768, 896), 3584),
    ("ade20k", 640): Augmentation((320, 480, 640, 800, 960, 1120), 4480),
    ("ade20k_panoptic", 640): Augmentation((256, 384, 512, 640, 768, 896), 3584),
    ("cityscapes", 1024): Augmentation((512, 768, 1024, 1280, 1536, 1792), 4096),
    ("coco_stuff_10k", 640): Augmentation((320, 480, 640, 800, 960, 1120), 4480),
}
"""By data set and ``INPUT.MIN_SIZE_TEST``; the other configs have Detectron2's default, ``Augmentation()``."""


def official_augmentation(config: MaskFormerConfig) -> Augmentation:
    """``TEST.AUG`` of the official config with this data set and size.

    >>> official_augmentation(MaskFormerConfig("mine", num_classes=7)).max_size
    4000
    """
    return OFFICIAL.get((config.dataset, config.test.min_size), Augmentation())


def augmented_images(image: np.ndarray, augmentation: Augmentation) -> Iterator[tuple[np.ndarray, bool]]:
    """Each size, and mirrored after it, with whether it is mirrored.

    Args:
        image: uint8 [height, width, 3]. Upstream this is what the test transform made (``resize_shortest_edge`` to ``config.test``), so
            that every pixel is resized twice.
        augmentation: sizes and mirroring.
    """
    for min_size in augmentation.min_sizes:
        resized = resize_shortest_edge(image, min_size, augmentation.max_size)
        yield resized, False
        if augmentation.flip:
            yield resized[:, ::-1], True


def augmented_scores(infer: Callable[[np.ndarray], Any], image: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    """The mean of the scores of all augmented images, added in their order.

    Args:
        infer: image, uint8 [height, width, 3] → scores, float [classes, output height, output width], at the same output size for all:
            ``semantic_inference`` with ``output_sizes``.
        image, augmentation: see :func:`augmented_images`.

    Returns:
        dtype of the scores [classes, output height, output width].
    """
    total: Any = 0
    for augmented, mirrored in augmented_images(image, augmentation):
        scores = np.asarray(infer(augmented))
        total = total + (scores[..., ::-1] if mirrored else scores)
    return total / np.array(len(augmentation.min_sizes) * (1 + augmentation.flip), total.dtype)
