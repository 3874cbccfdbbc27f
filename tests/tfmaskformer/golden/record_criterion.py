"""Records criterion.npz: what the official matcher and criterion make of small random outputs.

Run in the repository root, with facebookresearch/MaskFormer (commit da3e60d) and detectron2 (commit 02b5c4e) given:

    MASKFORMER_SOURCE=… DETECTRON2_SOURCE=… python -m tests.tfmaskformer.golden.record_criterion

The arrays of each case: ``logits`` [layers, batch, queries, classes + 1] and ``pred_masks`` [layers, batch, queries, h, w] float32 (the
final layer first, then 0, 1, …), ``labels`` [batch, objects], ``masks`` [batch, objects, H, W], ``num_objects`` [batch]; from the official
code in float64: ``costs`` [4, layers, batch, queries, objects] (class, focal, dice, total; 0 for padding), ``assignment``, ``losses``
[layers, 3] (ce, mask, dice), ``total``, ``logits_gradient`` and ``pred_masks_gradient`` of the weighted total.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from parity import official

FILE = Path(__file__).with_name("criterion.npz")

CASES = {
    "padded_batch": {"layers": 3, "queries": 7, "classes": 5, "size": (33, 50), "num_objects": (4, 2)},
    "more_objects_than_queries": {"layers": 2, "queries": 3, "classes": 4, "size": (17, 22), "num_objects": (5, 2)},
    "an_image_without_objects": {"layers": 2, "queries": 6, "classes": 3, "size": (24, 16), "num_objects": (0, 3)},
    "no_objects": {"layers": 1, "queries": 5, "classes": 3, "size": (9, 13), "num_objects": (0, 0)},
    "confident": {"layers": 1, "queries": 5, "classes": 3, "size": (19, 30), "num_objects": (3,), "scale": 30.0},
}
WEIGHTS = {"ce": 1.0, "mask": 20.0, "dice": 1.0}
NO_OBJECT_WEIGHT = 0.1


def inputs(name: str) -> dict[str, np.ndarray]:
    """Random outputs and targets of a case; rectangles as masks."""
    case = CASES[name]
    rng = np.random.default_rng(list(CASES).index(name))
    (height, width), batch, objects = case["size"], len(case["num_objects"]), max(2, *case["num_objects"])
    shape = (case["layers"], batch, case["queries"])
    masks = np.zeros((batch, objects, height, width), bool)
    for mask in masks.reshape(-1, height, width):
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        mask[top : top + rng.integers(3, height), left : left + rng.integers(3, width)] = True
    scale = case.get("scale", 2.0)
    return {
        "logits": (scale * rng.normal(size=(*shape, case["classes"] + 1))).astype(np.float32),
        "pred_masks": (scale * rng.normal(size=(*shape, -(-height // 4), -(-width // 4)))).astype(np.float32),
        "labels": rng.integers(0, case["classes"], (batch, objects)),
        "masks": masks,
        "num_objects": np.array(case["num_objects"]),
    }


def record(name: str) -> dict[str, np.ndarray]:
    """Inputs of a case and what the official code makes of them."""
    official.load()
    import torch
    from mask_former.modeling import matcher as official_matcher
    from mask_former.modeling.criterion import SetCriterion

    case = inputs(name)
    logits, pred_masks = (torch.tensor(case[key], dtype=torch.float64, requires_grad=True) for key in ("logits", "pred_masks"))
    final, *aux = ({"pred_logits": x, "pred_masks": y} for x, y in zip(logits, pred_masks, strict=True))
    outputs = {**final, "aux_outputs": aux}
    targets = [
        {"labels": torch.tensor(labels[:n]), "masks": torch.tensor(masks[:n])}
        for labels, masks, n in zip(case["labels"], case["masks"], case["num_objects"], strict=True)
    ]
    matcher = official_matcher.HungarianMatcher(WEIGHTS["ce"], WEIGHTS["mask"], WEIGHTS["dice"])
    criterion = SetCriterion(CASES[name]["classes"], matcher, {}, NO_OBJECT_WEIGHT, ["labels", "masks"]).double()
    losses = criterion(outputs, targets)
    total = sum(WEIGHTS[key.split("_")[1]] * loss for key, loss in losses.items())
    total.backward()

    costs = np.zeros((4, *case["logits"].shape[:3], case["labels"].shape[1]))
    assignment = np.full((len(logits), *case["labels"].shape), -1)
    for layer, layer_outputs in enumerate([final, *aux]):
        for image, (queries, objects) in enumerate(matcher(layer_outputs, targets)):
            assignment[layer, image, objects] = queries
            one = {key: value[image : image + 1] for key, value in layer_outputs.items()}
            for part in range(4):
                costs[part, layer, image, :, : case["num_objects"][image]] = _cost_matrix(official_matcher, part, one, targets[image])
    return case | {
        "costs": costs,
        "assignment": assignment,
        "losses": np.array([loss.item() for loss in losses.values()]).reshape(-1, 3),
        "total": np.array(total.item()),
        "logits_gradient": logits.grad.numpy(),
        "pred_masks_gradient": pred_masks.grad.numpy(),
    }


def _cost_matrix(module, part, outputs, target):
    """The cost matrix that the official matcher hands to SciPy, with the weights (1, 0, 0), (0, 1, 0), (0, 0, 1) or the real ones."""
    weights = [(1, 0, 0), (0, 1, 0), (0, 0, 1), tuple(WEIGHTS.values())][part]
    matrices = []

    def keep(matrix):
        matrices.append(matrix.numpy())
        return solve(matrix)

    solve, module.linear_sum_assignment = module.linear_sum_assignment, keep
    try:
        module.HungarianMatcher(*weights)(outputs, [target])
    finally:
        module.linear_sum_assignment = solve
    return matrices[0]


if __name__ == "__main__":
    np.savez_compressed(FILE, **{f"{name}/{key}": value for name in CASES for key, value in record(name).items()})
    print(f"{FILE}: {FILE.stat().st_size / 1024:.0f} KiB")
