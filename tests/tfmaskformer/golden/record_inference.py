"""Records inference.npz: what the official evaluation branch makes of given outputs, in float64.

    MASKFORMER_SOURCE=… DETECTRON2_SOURCE=… python tests/tfmaskformer/golden/record_inference.py

``MaskFormer.forward`` of mask_former/mask_former_model.py runs unbound on a stand-in model that returns the given outputs, so that
padding, upsampling, crop, resize and both inferences are the official ones. Recorded with PyTorch 2.13 on CPU, facebookresearch/
MaskFormer da3e60d85fdeedcb31476b5edd7d328826ce56cc, facebookresearch/detectron2 02b5c4e295e990042a714712c21dc79b731e8833.

Keys are ``<case>/<name>``, and ``<case>/<image>/<name>`` for results; segments_info has a row (id, isthing, category_id) for each segment.
"""

from __future__ import annotations

import functools
import types
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("inference.npz")
KEYS = ("id", "isthing", "category_id")
OVERLAP_OF_QUERY_3 = 194 / 368
"""In the cases of edges: pixels that it wins, of those where its mask is at least ½."""
SEMANTIC = ("batch", "odd")
"""Cases of which the scores are recorded too; a small file."""


def official_inference(case, *, panoptic_on):
    """The official results, one dict for each image; with ``panoptic_on`` logits are resized, else probabilities."""
    import torch

    from parity import official

    official.load()
    from mask_former.mask_former_model import MaskFormer

    class Head:
        num_classes = case["pred_logits"].shape[-1] - 1

        def __call__(self, _):
            return {key: torch.from_numpy(case[key]) for key in ("pred_logits", "pred_masks")}

    model = types.SimpleNamespace(
        device="cpu",
        pixel_mean=0.0,
        pixel_std=1.0,
        backbone=lambda images: images,
        training=False,
        sem_seg_head=Head(),
        size_divisibility=int(case["size_divisibility"]),
        panoptic_on=panoptic_on,
        sem_seg_postprocess_before_inference=panoptic_on,
        object_mask_threshold=float(case["object_mask_threshold"]),
        overlap_threshold=float(case["overlap_threshold"]),
        metadata=types.SimpleNamespace(thing_dataset_id_to_contiguous_id={1000 + index: index for index in case["thing_classes"].tolist()}),
    )
    for name in ("semantic_inference", "panoptic_inference"):
        setattr(model, name, functools.partial(getattr(MaskFormer, name), model))
    inputs = [
        {"image": torch.zeros(3, *image), "height": output[0], "width": output[1]}
        for image, output in zip(case["image_sizes"].tolist(), case["output_sizes"].tolist(), strict=True)
    ]
    return MaskFormer.forward(model, inputs)


def random_case(seed, image_sizes, output_sizes, *, size_divisibility, queries, classes, thing_classes, thresholds):
    """Round masks of random place and size, with noise; the numbers are short, for a small file."""
    rng = np.random.default_rng(seed)
    divisor = max(size_divisibility, 1)
    height, width = (-(-max(lengths) // divisor) * divisor for lengths in zip(*image_sizes, strict=True))
    height, width = -(-height // 4), -(-width // 4)
    shape = (len(image_sizes), queries)
    y, x = np.mgrid[:height, :width] + 0.5
    centre_y, centre_x = (rng.uniform(0, length, (*shape, 1, 1)) for length in (height, width))
    distance = np.hypot((y - centre_y) / height, (x - centre_x) / width)
    masks = 9 * (1 - distance / rng.uniform(0.1, 0.5, (*shape, 1, 1))) + rng.normal(size=(*shape, height, width))
    return {
        "pred_logits": np.round(rng.normal(size=(*shape, classes + 1)) * 3, 4),
        "pred_masks": np.round(masks * 256) / 256,
        "image_sizes": np.array(image_sizes),
        "output_sizes": np.array(output_sizes),
        "size_divisibility": np.array(size_divisibility),
        "thing_classes": np.array(thing_classes, int),
        "object_mask_threshold": np.array(thresholds[0]),
        "overlap_threshold": np.array(thresholds[1]),
    }


def edges(overlap_threshold):
    """Every comparison at equality. Masks of ±50 are 0 or 1 to the last bit, those of 0 exactly ½."""
    masks = np.full((8, 8, 8), -50.0)
    logits = np.full((8, 4), -50.0)
    logits[0] = 0.0  # a score of ¼, not above the threshold: the row above the last is not for this query
    masks[0, 6:7] = 50
    logits[1, :2] = 4.0  # two classes equally probable: the first counts
    masks[1, :6, :2] = 50
    logits[2, 2:] = 4.0  # as probable as no object: kept
    masks[2, :6, 2:4] = 50
    logits[3, 1], logits[3, 3] = 5.0, -5.0  # ½ where query 4 is 1: these pixels belong to its area
    masks[3, :6, 4:6], masks[3, :6, 6:] = 50, 0
    logits[4, 1] = 5.0  # wins them; query 5 of another class ties with it and gets none
    logits[5, 0] = 5.0
    masks[4:6, :6, 6:] = 50
    logits[6, 2] = 5.0  # merged with query 2
    masks[6, 6:7] = 50
    logits[7, 0] = 5.0  # wins the last row, but is nowhere above ½: dropped
    masks[7, 7:] = -1
    return {
        "pred_logits": logits[np.newaxis],
        "pred_masks": masks[np.newaxis],
        "image_sizes": np.array([[32, 32]]),
        "output_sizes": np.array([[32, 32]]),
        "size_divisibility": np.array(0),
        "thing_classes": np.array([0, 1]),
        "object_mask_threshold": np.array(0.25),
        "overlap_threshold": np.array(overlap_threshold),
    }


def cases():
    return {
        # The canvas of 64×64 px is larger than both images; outputs have other sizes.
        "batch": random_case(
            189,
            [(40, 58), (61, 37)],
            [(17, 25), (31, 22)],
            size_divisibility=32,
            queries=18,
            classes=4,
            thing_classes=(0, 2),
            thresholds=(0.5, 0.5),
        ),
        # As the COCO models: no padding, odd sizes, several stuff queries of one class.
        "odd": random_case(
            122, [(35, 27)], [(35, 27)], size_divisibility=0, queries=16, classes=4, thing_classes=(1,), thresholds=(0.5, 0.4)
        ),
        "only_stuff": random_case(
            102, [(30, 26)], [(23, 40)], size_divisibility=0, queries=16, classes=3, thing_classes=(), thresholds=(0.5, 0.6)
        ),
        "nothing_kept": random_case(
            3, [(12, 9)], [(8, 7)], size_divisibility=0, queries=5, classes=3, thing_classes=(0,), thresholds=(1.0, 0.8)
        ),
        "edges": edges(OVERLAP_OF_QUERY_3),
        "edges_above": edges(np.nextafter(OVERLAP_OF_QUERY_3, 1)),
    }


def record():
    """The content of the file, by key; says what there is to see in each case."""
    arrays = {}
    for name, case in cases().items():
        arrays |= {f"{name}/{key}": value for key, value in case.items()}
        before, after = (official_inference(case, panoptic_on=on) for on in (True, False))
        all_things = {**case, "thing_classes": np.arange(case["pred_logits"].shape[-1] - 1)}
        no_overlap = {**case, "overlap_threshold": np.array(0.0)}
        apart, unfiltered = (official_inference(variant, panoptic_on=True) for variant in (all_things, no_overlap))
        for index, result in enumerate(before):
            panoptic_seg, segments_info = result["panoptic_seg"]
            results = {
                "panoptic_seg": panoptic_seg.numpy().astype(np.uint8),
                "segments_info": np.array([tuple(segment[key] for key in KEYS) for segment in segments_info], int).reshape(-1, 3),
            }
            if name in SEMANTIC:
                results |= {"scores_before": result["sem_seg"].numpy(), "scores_after": after[index]["sem_seg"].numpy()}
            arrays |= {f"{name}/{index}/{key}": value for key, value in results.items()}
            print(
                f"{name}/{index}: {len(segments_info)} segments, {sum(segment['isthing'] for segment in segments_info)} of things; "
                f"{len(apart[index]['panoptic_seg'][1])} without merging, {len(unfiltered[index]['panoptic_seg'][1])} without the "
                f"overlap test; {int((panoptic_seg == 0).sum())} px without one"
            )
    return arrays


if __name__ == "__main__":
    np.savez_compressed(FILE, **record())
    print(f"{FILE}: {FILE.stat().st_size} bytes")
