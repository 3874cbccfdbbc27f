"""Records the files beside this one: what the official evaluators make of generated data.

    PYTHONPATH=.:panopticapi MASKFORMER_SOURCE=… DETECTRON2_SOURCE=… python tests/golden/evaluation/record.py [NAME…]

with cocodataset/panopticapi at 7bb4655548f98f3fedc07bf37e9040a992b054b0 in the folder panopticapi, facebookresearch/MaskFormer at
da3e60d85fdeedcb31476b5edd7d328826ce56cc, facebookresearch/detectron2 at 02b5c4e295e990042a714712c21dc79b731e8833, pycocotools 2.0.11.

panoptic.npz   Detectron2's COCOPanopticEvaluator and panopticapi's pq_compute
semantic.npz   Detectron2's SemSegEvaluator, without the boundary IoU
instances.npz  Detectron2's COCOEvaluator, which is pycocotools
augmented.npz  MaskFormer's SemanticSegmentorWithTTA, on a stand-in and on the small trained model in float64
shapes.npz     Detectron2's inference_on_dataset with its three evaluators: the small trained model on 50 images, as train_net.py does it,
               and on the first 6 with SemanticSegmentorWithTTA

Maps of different sizes are one flat array, "sizes" has their (height, width); "json" is everything else.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
THINGS, CLASSES = 23, 41
DATASET_IDS = [index + index // 7 + 1 for index in range(CLASSES)]
"""Not contiguous, as COCO's."""


def packed(maps, dtype):
    return {
        "maps": np.concatenate([np.asarray(values, dtype).ravel() for values in maps]),
        "sizes": np.array([values.shape for values in maps]),
    }


def save(name, document, **arrays):
    flat = {f"{key}_{part}": array for key, values in arrays.items() for part, array in values.items()}
    np.savez_compressed(HERE / f"{name}.npz", json=json.dumps(document), **flat)
    print(f"{name}.npz: {(HERE / f'{name}.npz').stat().st_size} bytes", file=sys.stderr)


def blobs(rng, height, width, number):
    """int [height, width]: 0 … number, in blocks of random size that may be empty."""
    rows, columns = (np.sort(rng.integers(0, 5, length)) for length in (height, width))
    return rng.integers(0, number + 1, (5, 5))[rows][:, columns]


def panoptic_case(rng, index):
    """Truth and prediction of an image. Some have no segments at all; areas of some true segments are those before others covered them."""
    height, width = rng.integers(1, 60, 2).tolist() if index else (1, 1)
    truth = blobs(rng, height, width, 9)
    ids = np.concatenate([[0], np.sort(rng.choice(np.arange(1, 250), 9, replace=False))])
    truth = ids[truth]
    if index % 11 == 5:
        truth[:] = 0
    classes = rng.integers(0, CLASSES - 2, 3)  # the last two are never met; few in an image, so that some meet often
    true_info = []
    for segment in np.unique(truth[truth > 0]).tolist():
        true_info.append(
            {
                "id": segment,
                "category_id": int(rng.choice(classes)),
                "iscrowd": int(rng.random() < 0.15),
                "area": int((truth == segment).sum()) + int(index % 4 == 3) * int(rng.integers(0, 40)),
            }
        )
    if index % 8 == 7:
        true_info.append({"id": 251, "category_id": int(classes[0]), "iscrowd": 0, "area": 12})  # covered wholly
    predicted = np.roll(truth, rng.integers(-1, 2, 2), (0, 1)).astype(np.int32)
    names = {0: 0}
    names |= {old: new for new, old in enumerate(rng.permutation(np.unique(predicted[predicted > 0])).tolist(), 1)}
    predicted = np.vectorize(names.__getitem__, otypes=[np.int32])(predicted)
    category = {info["id"]: info["category_id"] for info in true_info}
    infos = {new: category[old] if rng.random() < 0.8 else int(rng.integers(0, CLASSES - 2)) for old, new in names.items() if old}
    if rng.random() < 0.5:
        block = np.s_[rng.integers(height) :, rng.integers(width) :]
        predicted[block] = len(names)
        infos[len(names)] = int(rng.choice(classes))
    if rng.random() < 0.3:
        predicted[rng.integers(height)] = 0
    if index % 13 == 6:
        predicted[:] = 0
    found = set(np.unique(predicted).tolist())
    info = [{"id": new, "isthing": label < THINGS, "category_id": label} for new, label in sorted(infos.items()) if new in found]
    return (truth, true_info), (predicted, info)


def record_panoptic():
    import torch
    from detectron2.data import MetadataCatalog
    from detectron2.evaluation import COCOPanopticEvaluator
    from panopticapi.evaluation import pq_compute
    from panopticapi.utils import id2rgb

    rng = np.random.default_rng(0)
    cases = [panoptic_case(rng, index) for index in range(60)]
    categories = [{"id": DATASET_IDS[index], "name": f"c{index}", "isthing": int(index < THINGS)} for index in range(CLASSES)]
    names = [f"picture_{index:03}" for index in range(len(cases))]
    with tempfile.TemporaryDirectory() as scratch:
        truth, results, files = (Path(scratch, name) for name in ("truth", "results", "files"))
        for folder in (truth, results, files):
            folder.mkdir()
        annotations = []
        for index, (name, ((ids, info), _)) in enumerate(zip(names, cases, strict=True)):
            Image.fromarray(id2rgb(ids)).save(truth / f"{name}.png")
            mapped = [{**segment, "category_id": DATASET_IDS[segment["category_id"]]} for segment in info]
            annotations.append({"image_id": 1000 + index, "file_name": f"{name}.png", "segments_info": mapped})
        images = [{"id": 1000 + index, "file_name": f"{name}.jpg"} for index, name in enumerate(names)]
        (truth / "truth.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        MetadataCatalog.get("evaluation_panoptic").set(
            panoptic_json=str(truth / "truth.json"),
            panoptic_root=str(truth),
            thing_dataset_id_to_contiguous_id={DATASET_IDS[index]: index for index in range(THINGS)},
            stuff_dataset_id_to_contiguous_id={DATASET_IDS[index]: index for index in range(THINGS, CLASSES)},
        )
        evaluator = COCOPanopticEvaluator("evaluation_panoptic", str(results))
        evaluator.reset()
        inputs = [{"file_name": f"folder/{name}.jpg", "image_id": 1000 + index} for index, name in enumerate(names)]
        outputs = [{"panoptic_seg": (torch.from_numpy(ids), copy.deepcopy(info))} for _, (ids, info) in cases]
        evaluator.process(inputs, outputs)
        for prediction in evaluator._predictions:
            (files / prediction["file_name"]).write_bytes(prediction["png_string"])
        official = evaluator.evaluate()["panoptic_seg"]
        written = json.loads((results / "predictions.json").read_text())
        with contextlib.redirect_stdout(io.StringIO()):
            quality = pq_compute(str(truth / "truth.json"), str(results / "predictions.json"), str(truth), str(files))
        first_png = (files / f"{names[7]}.png").read_bytes()
    document = {
        "names": names,
        "num_things": THINGS,
        "dataset_ids": DATASET_IDS,
        "true_segments_info": [case[0][1] for case in cases],
        "segments_info": [case[1][1] for case in cases],
        "truth_json": {"images": images, "annotations": annotations, "categories": categories},
        "predictions_json": written,
        "png_of_7": first_png.hex(),
        "detectron2": official,
        "panopticapi": quality,
    }
    save("panoptic", document, true=packed([case[0][0] for case in cases], np.uint8), predicted=packed([c[1][0] for c in cases], np.uint8))


def record_semantic():
    import torch
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.evaluation import SemSegEvaluator

    rng = np.random.default_rng(1)
    number, ignored = 12, 255
    truths, predictions = [], []
    for index in range(14):
        height, width = rng.integers(1, 50, 2)
        truth = blobs(rng, height, width, number - 3)  # the last two classes are never true, but predicted
        predicted = np.where(rng.random(truth.shape) < 0.3, rng.integers(0, number - 1, truth.shape), truth)
        truth[rng.random(truth.shape) < 0.1] = ignored
        if index == 4:
            truth[:] = ignored
        truth[truth == 5] = 6  # nor is this one
        truths.append(truth)
        predictions.append(predicted)
    with tempfile.TemporaryDirectory() as scratch:
        records = []
        for index, truth in enumerate(truths):
            Image.fromarray(truth.astype(np.uint8)).save(Path(scratch, f"{index}.png"))
            records.append({"file_name": f"images/{index}.jpg", "sem_seg_file_name": str(Path(scratch, f"{index}.png"))})
        DatasetCatalog.register("evaluation_semantic", lambda: records)
        MetadataCatalog.get("evaluation_semantic").set(
            stuff_classes=[f"c{index}" for index in range(number)],
            stuff_dataset_id_to_contiguous_id={DATASET_IDS[index]: index for index in range(number)},
            ignore_label=ignored,
        )
        evaluator = SemSegEvaluator("evaluation_semantic", output_dir=scratch)
        evaluator._compute_boundary_iou = False  # as where OpenCV is missing
        evaluator.reset()
        for start in range(0, len(records), 4):
            one_hot = [np.eye(number)[predicted].transpose(2, 0, 1) for predicted in predictions[start : start + 4]]
            evaluator.process(records[start : start + 4], [{"sem_seg": torch.from_numpy(scores)} for scores in one_hot])
        results = evaluator.evaluate()["sem_seg"]
        written = json.loads(Path(scratch, "sem_seg_predictions.json").read_text())
        confusion = evaluator._conf_matrix.tolist()
    document = {
        "num_classes": number,
        "ignore_label": ignored,
        "dataset_ids": DATASET_IDS[:number],
        "results": results,
        "confusion": confusion,
        "predictions_json": written,
    }
    save("semantic", document, true=packed(truths, np.uint8), predicted=packed(predictions, np.uint8))


def record_instances():
    """Things of panoptic maps with scores, some equal; small, medium and large objects, crowds, images without truth or without results."""
    import pycocotools.mask as mask_util
    import torch
    from detectron2.data import MetadataCatalog
    from detectron2.evaluation import COCOEvaluator
    from detectron2.structures import BitMasks, Instances

    rng = np.random.default_rng(2)
    number = 5
    images, annotations, cases, inputs, outputs = [], [], [], [], []
    for index in range(16):
        height, width = rng.integers(90, 230, 2).tolist()
        image_id = 500 - 7 * index
        images.append({"id": image_id, "height": height, "width": width, "file_name": f"{index}.jpg"})
        truth = blobs(rng, height, width, 8)
        truth[rng.integers(height) :: 37, :10] = 9
        classes = rng.integers(0, number, 10)
        for segment in np.unique(truth[truth > 0]).tolist() if index != 3 else []:
            rle = mask_util.encode(np.asfortranarray((truth == segment).astype(np.uint8)))
            box = mask_util.toBbox(rle).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": DATASET_IDS[classes[segment]],
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                    "area": int(mask_util.area(rle)),
                    "bbox": box,
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
        predicted = np.roll(truth, rng.integers(-6, 7, 2), (0, 1)).astype(np.int32) if index != 8 else np.zeros((height, width), np.int32)
        info = []
        for segment in np.unique(predicted[predicted > 0]).tolist():
            label = int(classes[segment]) if rng.random() < 0.85 else int(rng.integers(0, number))
            isthing = segment != 4
            category = label if isthing else number
            info.append({"id": segment, "isthing": isthing, "category_id": category, "score": float(rng.integers(80, 100)) / 100})
        cases.append((image_id, predicted, info))
        things = [segment for segment in info if segment["isthing"]]
        masks = torch.from_numpy(
            np.stack([predicted == segment["id"] for segment in things]) if things else np.zeros((0, height, width), bool)
        )
        inputs.append({"image_id": image_id})
        outputs.append(
            {
                "instances": Instances(
                    (height, width),
                    pred_boxes=BitMasks(masks).get_bounding_boxes(),
                    pred_masks=masks,
                    scores=torch.tensor([segment["score"] for segment in things], dtype=torch.float64),
                    pred_classes=torch.tensor([segment["category_id"] for segment in things], dtype=torch.int64),
                )
            }
        )
    truth_json = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": DATASET_IDS[index], "name": f"c{index}"} for index in range(number)],
    }
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "truth.json").write_text(json.dumps(truth_json))
        MetadataCatalog.get("evaluation_instances").set(
            json_file=str(Path(scratch, "truth.json")),
            thing_classes=[f"c{index}" for index in range(number)],
            thing_dataset_id_to_contiguous_id={DATASET_IDS[index]: index for index in range(number)},
        )
        evaluator = COCOEvaluator("evaluation_instances", ("segm",), output_dir=scratch, use_fast_impl=False)
        evaluator.reset()
        evaluator.process(inputs, outputs)
        with contextlib.redirect_stdout(io.StringIO()):
            results = evaluator.evaluate()["segm"]
        written = json.loads(Path(scratch, "coco_instances_results.json").read_text())
    document = {
        "dataset_ids": DATASET_IDS[:number],
        "truth_json": truth_json,
        "image_ids": [case[0] for case in cases],
        "segments_info": [case[2] for case in cases],
        "results": results,
        "predictions_json": written,
    }
    save("instances", document, predicted=packed([case[1] for case in cases], np.uint8))


def record_augmented():
    import torch
    from detectron2.modeling import DatasetMapperTTA
    from mask_former import SemanticSegmentorWithTTA

    from checkpoints import registry
    from parity import official, record_zoo
    from tfmaskformer.data import shapes

    code = official.load()
    path, options = record_zoo.TINY["shapes_panoptic"]
    config = code.config(code.maskformer / path)
    config.merge_from_list(list(options))
    small = code.model(config, Path(registry.__file__).parent / "small" / "shapes_panoptic.pkl", dtype="float64")

    class StandIn(torch.nn.Module):
        """Scores that depend on every pixel it gets, at the size that it is asked for; float32, so that the order of sums shows."""

        def forward(self, batched_inputs):
            results = []
            for item in batched_inputs:
                seen.append(item["image"].numpy().transpose(1, 2, 0))
                scores = np.random.default_rng(int(item["image"].double().sum())).random((3, item["height"], item["width"]), np.float32)
                results.append({"sem_seg": torch.from_numpy(scores)})
            return results

    image = shapes.sample("val", 3)[0]
    document, arrays = {"cases": []}, {"image": {"maps": image}}
    settings = [
        ("stand_in", StandIn(), image[:51, :67], (70, 93), (24, 48, 40), 60, True),
        ("no_flip", StandIn(), image[:40, :40], (40, 40), (40, 31), 100, False),
        ("small", small, image, (45, 61), (64, 96, 112), 130, True),
    ]
    for name, model, pixels, (height, width), min_sizes, max_size, flip in settings:
        seen: list[np.ndarray] = []
        tta = SemanticSegmentorWithTTA(config, model, DatasetMapperTTA(min_sizes, max_size, flip))
        [result] = tta([{"image": torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), "height": height, "width": width}])
        case = {"name": name, "input": pixels.shape[:2], "output": [height, width]}
        document["cases"].append(case | {"min_sizes": min_sizes, "max_size": max_size, "flip": flip})
        arrays[name] = {"scores": result["sem_seg"].numpy()}
        if seen:
            arrays[name] |= packed(seen, np.uint8)
    save("augmented", document, **arrays)


SHAPES_IMAGES, AUGMENTED_IMAGES = 50, 6
AUGMENTATION = (80, 112, 144), 180, True
"""Smaller than the config's, for speed; sizes meet the limit."""


def record_shapes():
    """The official loop: test loader, model in float32, evaluators. The things of its panoptic results are the instances, and panopticapi's
    converter makes their truth."""
    import importlib.util

    import panopticapi
    import torch
    from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_test_loader
    from detectron2.evaluation import COCOEvaluator, COCOPanopticEvaluator, DatasetEvaluators, SemSegEvaluator, inference_on_dataset
    from detectron2.modeling import DatasetMapperTTA
    from detectron2.structures import BitMasks, Instances
    from mask_former import SemanticSegmentorWithTTA

    from checkpoints import registry
    from parity import official, record_zoo
    from tfmaskformer.data import shapes

    code = official.load()
    path, options = record_zoo.TINY["shapes_panoptic"]
    config = code.config(code.maskformer / path)
    config.merge_from_list(list(options))
    small = code.model(config, Path(registry.__file__).parent / "small" / "shapes_panoptic.pkl")
    official_inference = small.panoptic_inference
    found = []

    def panoptic_inference(mask_cls, mask_pred):
        """The official result; the probability of each segment's class is kept beside it."""
        panoptic_seg, segments_info = official_inference(mask_cls, mask_pred)
        scores, labels = mask_cls.softmax(-1).max(-1)
        keep = labels.ne(small.sem_seg_head.num_classes) & (scores > small.object_mask_threshold)
        queries = (scores[keep].view(-1, 1, 1) * mask_pred[keep].sigmoid()).argmax(0) if keep.any() else None
        of = [float(scores[keep][queries[panoptic_seg == segment["id"]][0]]) for segment in segments_info]
        found.append((panoptic_seg.numpy(), copy.deepcopy(segments_info), of))
        return panoptic_seg, segments_info

    small.panoptic_inference = panoptic_inference
    labels = []

    class WithInstances(torch.nn.Module):
        def forward(self, batched_inputs):
            [result] = small(batched_inputs)
            labels.append(result["sem_seg"].argmax(0).numpy())
            panoptic_seg, segments_info, scores = found[-1]
            things = [(segment, score) for segment, score in zip(segments_info, scores, strict=True) if segment["isthing"]]
            masks = [torch.from_numpy(panoptic_seg == segment["id"]) for segment, _ in things]
            masks = torch.stack(masks) if masks else torch.zeros((0, *panoptic_seg.shape), dtype=torch.bool)
            instances = Instances(
                panoptic_seg.shape,
                pred_boxes=BitMasks(masks).get_bounding_boxes(),
                pred_masks=masks,
                scores=torch.tensor([score for _, score in things]),
                pred_classes=torch.tensor([segment["category_id"] for segment, _ in things], dtype=torch.int64),
            )
            return [{**result, "instances": instances}]

    with tempfile.TemporaryDirectory() as scratch:
        folder, results = Path(scratch, "shapes"), str(Path(scratch, "results"))
        shapes.write(folder, "val", SHAPES_IMAGES)
        annotations = folder / "annotations"
        truth = json.loads((annotations / "panoptic_val.json").read_text())
        records = [
            {"file_name": str(folder / "val" / image["file_name"]), "image_id": image["id"], "height": image["height"]}
            | {"width": image["width"], "sem_seg_file_name": str(annotations / "semantic_val" / image["file_name"])}
            for image in truth["images"]
        ]
        file = Path(panopticapi.__file__).parents[1] / "converters" / "panoptic2detection_coco_format.py"
        spec = importlib.util.spec_from_file_location("converter", file)
        converter = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(converter)
        categories = {category["id"]: category for category in truth["categories"]}
        with contextlib.redirect_stdout(io.StringIO()):
            instances = converter.convert_panoptic_to_detection_coco_format_single_core(
                0, truth["annotations"], categories, str(annotations / "panoptic_val"), True
            )
        for number, annotation in enumerate(instances, 1):  # not from 0, as its caller would: pycocotools takes that for "no match"
            annotation["id"] = number
        document = {"images": truth["images"], "annotations": instances}
        document["categories"] = [category for category in truth["categories"] if category["isthing"]]
        (annotations / "instances_val.json").write_text(json.dumps(document))

        known = MetadataCatalog.get("shapes_train")
        things = {category.id: index for index, category in enumerate(shapes.CATEGORIES) if category.isthing}
        names = [category.name for category in shapes.CATEGORIES]
        MetadataCatalog.get("shapes_recorded").set(
            panoptic_json=str(annotations / "panoptic_val.json"),
            panoptic_root=str(annotations / "panoptic_val"),
            thing_dataset_id_to_contiguous_id=known.thing_dataset_id_to_contiguous_id,
            stuff_dataset_id_to_contiguous_id=known.stuff_dataset_id_to_contiguous_id,
        )
        DatasetCatalog.register("shapes_recorded_semantic", lambda: records)
        MetadataCatalog.get("shapes_recorded_semantic").set(
            stuff_classes=names,
            stuff_dataset_id_to_contiguous_id={category.id: index for index, category in enumerate(shapes.CATEGORIES)},
            ignore_label=255,
        )
        MetadataCatalog.get("shapes_recorded_instances").set(
            json_file=str(annotations / "instances_val.json"),
            thing_classes=[name for name, category in zip(names, shapes.CATEGORIES, strict=True) if category.isthing],
            thing_dataset_id_to_contiguous_id=things,
        )
        semantic = SemSegEvaluator("shapes_recorded_semantic", output_dir=None)
        semantic._compute_boundary_iou = False
        evaluators = [
            COCOPanopticEvaluator("shapes_recorded", results),
            semantic,
            COCOEvaluator("shapes_recorded_instances", ("segm",), output_dir=results, use_fast_impl=False),
        ]
        loader = build_detection_test_loader(records, mapper=DatasetMapper(config, False), num_workers=0)
        with contextlib.redirect_stdout(io.StringIO()):
            metrics = inference_on_dataset(WithInstances(), loader, DatasetEvaluators(evaluators))
        confusion = semantic._conf_matrix.tolist()
        loader = build_detection_test_loader(records[:AUGMENTED_IMAGES], mapper=DatasetMapper(config, False), num_workers=0)
        small.panoptic_inference = official_inference
        augmented = inference_on_dataset(SemanticSegmentorWithTTA(config, small, DatasetMapperTTA(*AUGMENTATION)), loader, semantic)
    document = {
        "image_ids": [record["image_id"] for record in records],
        "segments_info": [[segment | {"score": score} for segment, score in zip(info, scores, strict=True)] for _, info, scores in found],
        "panoptic": metrics["panoptic_seg"],
        "semantic": metrics["sem_seg"],
        "confusion": confusion,
        "instances": metrics["segm"],
        "augmentation": AUGMENTATION,
        "augmented": augmented["sem_seg"],
        "augmented_confusion": semantic._conf_matrix.tolist(),
    }
    save("shapes", document, panoptic=packed([item[0] for item in found], np.uint8), semantic=packed(labels, np.uint8))


RECORDINGS = {
    "panoptic": record_panoptic,
    "semantic": record_semantic,
    "instances": record_instances,
    "augmented": record_augmented,
    "shapes": record_shapes,
}


def main(*names: str) -> None:
    from parity import official

    official.load().trainer()  # imports the official evaluators
    for name in names or RECORDINGS:
        RECORDINGS[name]()


if __name__ == "__main__":
    main(*sys.argv[1:])
