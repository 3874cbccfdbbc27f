"""The official dataset mappers and the batches for training, against recordings of the official code (tests/golden/data)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.tfmaskformer import recorded_recipes
from tfmaskformer.config import ConfigError
from tfmaskformer.data import augmentation, color, examples, generated, shapes, training
from tfmaskformer.data.augmentation import CROP_TRIES, NO_SEGMENT, Draws, draw, mapper_of
from tfmaskformer.data.datasets import open_dataset
from tfmaskformer.data.records import DataError
from tfmaskformer.official_yaml import defaults

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
RECORDED = json.loads((GOLDEN / "augmentation.json").read_text())
SPEC = importlib.util.spec_from_file_location("record_augmentation", GOLDEN / "record_augmentation.py")
record = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(record)

IMAGE, MAP = tf.TensorSpec([None, None, 3], tf.uint8), tf.TensorSpec([None, None], tf.int32)
DRAWS = Draws(*(tf.TensorSpec(shape, tf.float64) for shape in ([], [], [], [], [CROP_TRIES, 4], [9])))


def tree_of(changes):
    tree = defaults()
    for key, value in changes.items():
        *parents, last = key.split(".")
        inner = tree
        for parent in parents:
            inner = inner[parent]
        assert last in inner
        inner[last] = value
    return tree


def recorded_draws(log, mapper):
    """What upstream was given, in our order; NaN for what it did not ask for."""
    asked = {}
    for name, number in log:
        asked.setdefault(name, []).append(number)

    def take(name):
        numbers = asked.get(name, [])
        return numbers.pop(0) if numbers else np.nan

    sizes = asked.pop("ResizeShortestEdge.get_transform")
    crop_min_size = sizes.pop(0) if len(sizes) == 2 else np.nan
    corners = "RandomCrop_CategoryAreaConstraint" if "RandomCrop_CategoryAreaConstraint.get_transform" in asked else "RandomCrop"
    windows = [
        [
            take("RandomCrop.get_crop_size"),
            take("RandomCrop.get_crop_size"),
            take(f"{corners}.get_transform"),
            take(f"{corners}.get_transform"),
        ]
        for _ in range(CROP_TRIES)
    ]
    steps = {step: [take(f"ColorAugSSDTransform.{step}") for _ in range(2)] for step in record.COLOR_STEPS}
    order = take("ColorAugSSDTransform.apply_image")
    colors = [*steps["brightness"], order, *steps["contrast"], *steps["saturation"], *steps["hue"]]
    flip, branch = take("Augmentation._rand_range"), take("DETRPanopticDatasetMapper.__call__")
    assert not any(asked.values())
    assert len(sizes) == 1
    return Draws(*(tf.constant(numbers, tf.float64) for numbers in (sizes[0], flip, branch, crop_min_size, windows, colors)))


def masks_of(segments, count):
    return (np.asarray(segments) == np.arange(count)[:, np.newaxis, np.newaxis]).astype(np.uint8)


def sha256(array):
    return record.sha256(np.asarray(array))


@pytest.mark.parametrize("name", record.CONFIGS)
def test_equals_the_official_mapper(name):
    mapper = mapper_of(tree_of(record.CONFIGS[name]), record.IGNORE)
    semantic = mapper.name == augmentation.SEMANTIC

    @tf.function(input_signature=[DRAWS, IMAGE, MAP, MAP])
    def augment(draws, image, segments, sem_seg):
        return mapper(draws, image, None if semantic else segments, sem_seg)

    cases = {case: row for case, row in RECORDED["mappers"].items() if case.startswith(f"{name};")}
    assert len(cases) == record.IMAGES * record.REPETITIONS
    for case, row in cases.items():
        image, panoptic_seg, segments_info, sem_seg = record.sample(int(case.split()[-2].rstrip(",")))
        segments = {key: [segment[key] for segment in segments_info] for key in ("id", "category_id", "iscrowd")}
        labels, segments = training.panoptic_objects(panoptic_seg, {key: tf.constant(row, tf.int32) for key, row in segments.items()})
        augmented = augment(recorded_draws(row["draws"], mapper), image, segments, sem_seg)
        segments = augmented.segments
        if semantic:
            labels, segments = training.semantic_objects(augmented.sem_seg, record.IGNORE)
        assert tuple(augmented.image.shape[:2]) == tuple(row["size"]), case
        assert sha256(augmented.image) == row["image"], case
        assert labels.numpy().tolist() == row["labels"], case
        assert sha256(masks_of(segments, len(labels))) == row["masks"], case
        if "sem_seg" in row:
            assert sha256(augmented.sem_seg) == row["sem_seg"], case


def test_what_is_recorded():
    """Every branch of every mapper, and the tries of the limited crop."""
    asked = {
        name: [[function for function, _ in row["draws"]] for case, row in RECORDED["mappers"].items() if case.startswith(f"{name};")]
        for name in record.CONFIGS
    }
    assert {len(log) for log in asked["detr"]} == {3, 8}
    tries = {
        log.count("RandomCrop_CategoryAreaConstraint.get_transform") // 2 for log in asked["semantic, capped"] + asked["panoptic, capped"]
    }
    assert {1, CROP_TRIES} < tries
    for step in record.COLOR_STEPS:
        assert {log.count(f"ColorAugSSDTransform.{step}") for log in asked["semantic"]} == {1, 2}
    rows = RECORDED["mappers"].values()
    assert {number < 0.5 for row in rows for function, number in row["draws"] if function == "Augmentation._rand_range"} == {True, False}
    assert {number < 0.5 for row in rows for function, number in row["draws"] if function == "ColorAugSSDTransform.apply_image"} == {
        True,
        False,
    }
    assert any(not row["labels"] for row in rows)


def test_nearest_of_semantic_maps_is_pytorchs():
    torch_nearest = tf.function(augmentation.torch_nearest, input_signature=[tf.TensorSpec([], tf.int32)] * 2)
    for old, new, digest in RECORDED["nearest"]:
        assert sha256(torch_nearest(old, new)) == digest, (old, new)


def test_nearest_of_panoptic_maps_is_pillows():
    pillow_nearest = tf.function(augmentation.pillow_nearest, input_signature=[tf.TensorSpec([], tf.int32)] * 2)
    for old, new, _ in RECORDED["nearest"]:
        positions = Image.fromarray(np.arange(old, dtype=np.int32)[np.newaxis])
        np.testing.assert_array_equal(pillow_nearest(old, new), np.asarray(positions.resize((new, 1), Image.NEAREST))[0], f"{old} to {new}")


@pytest.mark.parametrize("case", RECORDED["color"])
def test_each_step_of_color(case):
    step, width, amount = case.split()
    draws = np.zeros(9)
    first = {"brightness": 0, "contrast": 3, "saturation": 5, "hue": 7}[step]
    draws[first : first + 2] = 0.6, float(amount)
    for order in (0.2, 0.7):
        draws[2] = order
        assert sha256(color_aug_ssd(record.colors(int(width)), draws)) == RECORDED["color"][case]


color_aug_ssd = tf.function(color.color_aug_ssd, input_signature=[IMAGE, tf.TensorSpec([9], tf.float64)])


@pytest.mark.parametrize("width", [256, 41])
def test_hsv_is_opencvs(width):
    there = tf.function(color.rgb_to_hsv, input_signature=[IMAGE])(record.colors(width))
    assert sha256(np.stack(there, axis=-1).astype(np.uint8)) == RECORDED["hsv"][f"forth {width}"]
    hue, saturation, value = (channel.astype(np.int32) for channel in np.moveaxis(record.hsv_colors(width), -1, 0))
    back = tf.function(color.hsv_to_rgb, input_signature=[MAP] * 3)(hue, saturation, value)
    assert sha256(back) == RECORDED["hsv"][f"back {width}"]


# Draws


def test_draws_are_uniform_and_a_function_of_the_seed():
    draws = tf.function(
        lambda: tf.map_fn(lambda number: draw(tf.stack([7, number])), tf.range(400, dtype=tf.int64), Draws(*[tf.float64] * 6))
    )()
    for name, numbers in draws._asdict().items():
        numbers = np.sort(numbers, axis=0)
        assert numbers.min() >= 0, name
        assert numbers.max() < 1, name
        places = (np.arange(400) + 0.5).reshape(-1, *[1] * (numbers.ndim - 1)) / 400
        assert np.abs(numbers - places).max() < 0.12, name  # Kolmogorov and Smirnov: 2e-5 for one number, 53 of them here
    again = draw([7, 11])
    for numbers, expected in zip(draws, again, strict=True):
        np.testing.assert_array_equal(numbers[11], expected)
    assert not np.array_equal(draw([8, 11]).color, again.color)


@pytest.mark.parametrize(
    ("crop_type", "crop_size", "heights"),
    [
        ("absolute", (30, 70), [30]),
        ("absolute", (130, 70), [100]),
        ("absolute_range", (40, 43), [40, 41, 42, 43]),
        ("absolute_range", (98, 300), [98, 99, 100]),
        ("absolute_range", (384, 600), [100]),
        ("relative", (0.305, 1.0), [31]),
        ("relative_range", (0.975, 0.5), [98, 99, 100]),
    ],
)
def test_windows(crop_type, crop_size, heights):
    """Of an image of 100 px × 80 px: every height upstream can draw, and every place that holds it."""
    draws = np.random.default_rng(0).random((3000, 4))
    windows = augmentation.crop_windows(crop_type, crop_size, tf.constant(draws), tf.constant([100, 80])).numpy()
    assert sorted(set(windows[:, 2].tolist())) == heights
    assert windows[:, :2].min() == 0
    corners = windows[:, :2] + windows[:, 2:]
    assert corners.max(0).tolist() == [100, 80]
    tops = windows[windows[:, 2] == heights[0], 0]
    assert len(set(tops.tolist())) == 100 - heights[0] + 1


def test_the_official_configs():
    """All of them are read, and none makes what its canvas does not hold."""
    canvases = {}
    for path in recorded_recipes.CONFIGS:
        mapper = mapper_of(recorded_recipes.official_tree(path))
        canvases.setdefault(mapper.name, set()).add(mapper.canvas())
    assert canvases == {
        "detr_panoptic": {(1333, 1333), (1000, 1000)},
        "mask_former_semantic": {(512, 512), (640, 640), (512, 1024), (1280, 1280)},
        "mask_former_panoptic": {(640, 640)},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"INPUT.DATASET_MAPPER_NAME": "mask_former_instance"}, "'INPUT.DATASET_MAPPER_NAME' is 'mask_former_instance', expected one of"),
        ({"INPUT.FORMAT": "BGR"}, "'INPUT.FORMAT' is 'BGR', supported: 'RGB'"),
        ({"INPUT.CROP.ENABLED": False}, "'INPUT.SIZE_DIVISIBILITY' is 96, expected 170 px or more"),
        ({"INPUT.CROP.TYPE": "absolut"}, "'INPUT.CROP.TYPE' is 'absolut'"),
        ({"INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"}, "'INPUT.MIN_SIZE_TRAIN' is .*, expected the least and the largest size"),
    ],
)
def test_unsupported_values(changes, message):
    with pytest.raises(ConfigError, match=message):
        mapper_of(tree_of(record.SEMANTIC | changes))


# Targets


def test_objects_beyond_the_largest_are_dropped():
    """The smallest go, empty ones first; the others keep their order."""
    segments = tf.constant([[0, 0, 2, 2, 2, -1], [4, 2, 2, 0, 0, 3]])  # 4, 0, 5, 1, 1 px
    for max_objects, kept, expected in (
        (7, [0, 1, 2, 3, 4], segments.numpy().tolist()),
        (4, [0, 2, 3, 4], [[0, 0, 1, 1, 1, -1], [3, 1, 1, 0, 0, 2]]),
        (2, [0, 2], [[0, 0, 1, 1, 1, -1], [-1, 1, 1, 0, 0, -1]]),
        (1, [2], [[-1, -1, 0, 0, 0, -1], [-1, 0, 0, -1, -1, -1]]),
    ):
        found, renamed = training.largest_objects(tf.constant(5), segments, max_objects)
        assert (found.numpy().tolist(), renamed.numpy().tolist()) == (kept, expected)
    found, renamed = training.largest_objects(tf.constant(0), tf.fill([2, 3], NO_SEGMENT), 4)
    assert found.shape == (0,)
    assert (renamed.numpy() == NO_SEGMENT).all()


# Batches


SIZE = 64
CROP = {"ENABLED": True, "TYPE": "absolute", "SIZE": (32, 32), "SINGLE_CATEGORY_MAX_AREA": 1.0}
NO_CROP = CROP | {"ENABLED": False}


def config_of_shapes(**changes):
    tree = recorded_recipes.official_tree("configs/coco-panoptic/maskformer_panoptic_R50_bs64_554k.yaml")
    tree["DATASETS"]["TRAIN"] = ("shapes_train",)
    tree["MODEL"]["SEM_SEG_HEAD"]["NUM_CLASSES"] = 7
    tree["INPUT"] |= {"MIN_SIZE_TRAIN": (40, 48), "MAX_SIZE_TRAIN": SIZE, "CROP": NO_CROP, **changes}
    return tree


@pytest.fixture(scope="module")
def shapes_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    shapes.write(folder / "shapes", "train", 7)
    return open_dataset("shapes", folder, "train")


def taken(count, dataset, **options):
    options = {"seed": 3, "batch": 4, "max_objects": 5} | options
    config = options.pop("config", config_of_shapes())
    return [
        tf.nest.map_structure(lambda leaf: leaf.numpy(), batch)
        for batch in training.training_dataset(config, dataset, **options).take(count)
    ]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


def test_batches_have_one_shape_and_every_epoch_has_every_image(shapes_set):
    batches = taken(7, shapes_set, max_objects=2)
    for batch in batches:
        assert batch["image"].shape == (4, SIZE, SIZE, 3)
        assert batch["segments"].shape == (4, SIZE, SIZE)
        assert batch["labels"].shape == (4, 2)
        for index in range(4):
            height, width = batch["size"][index]
            assert (batch["image"][index, height:] == 0).all()
            assert (batch["image"][index, :, width:] == 0).all()
            assert (batch["segments"][index, height:] == NO_SEGMENT).all()
            assert (batch["segments"][index, :, width:] == NO_SEGMENT).all()
            assert batch["segments"][index].max() < batch["num_objects"][index] <= 2
            assert (batch["labels"][index, batch["num_objects"][index] :] == 0).all()
    ids = np.concatenate([batch["image_id"] for batch in batches])
    epochs = ids.reshape(4, 7)
    assert {len(set(epoch)) for epoch in epochs.tolist()} == {7}
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    known = {str(record.image_id): len([segment for segment in record.segments if not segment.iscrowd]) for record in shapes_set.records}
    for batch in batches:
        assert (batch["num_objects"] + batch["dropped"]).tolist() == [known[image_id.decode()] for image_id in batch["image_id"]]
    assert sum(batch["dropped"].sum() for batch in batches) > 0
    seen = {}
    for batch in batches:
        for image_id, image in zip(batch["image_id"], batch["image"], strict=True):
            seen.setdefault(image_id, set()).add(image.tobytes())
    assert sum(map(len, seen.values())) > 14  # each epoch has its own draws, of two sizes and two sides


def test_batches_are_a_function_of_the_seed_and_their_number(shapes_set):
    batches = taken(5, shapes_set)
    assert_same(taken(5, shapes_set), batches)
    assert_same(taken(2, shapes_set, start=3), batches[3:])
    parts = [taken(3, shapes_set, shard=(index, 2)) for index in range(2)]
    assert_same([{key: np.concatenate([one[key], other[key]]) for key in one} for one, other in zip(*parts, strict=True)], batches[:3])
    (other,) = taken(1, shapes_set, seed=4)
    assert other["image_id"].tolist() != batches[0]["image_id"].tolist()
    assert not np.array_equal(other["image"], batches[0]["image"])


def test_a_batch_is_what_the_mapper_makes(shapes_set):
    """Of the draws that seed, epoch and image give; masks are those of the objects that were kept."""
    config = config_of_shapes(CROP=CROP)
    (batch,) = taken(1, shapes_set, max_objects=20, canvas=(80, 70), config=config)
    images, sizes, targets = training.step_arguments(batch)
    number = [str(record.image_id) for record in shapes_set.records].index(batch["image_id"][1].decode())
    sample = examples.element(shapes_set.load(shapes_set.records[number]))
    labels, segments = training.panoptic_objects(sample["panoptic_seg"], sample["segments"])
    made = mapper_of(config)(draw([3, number]), tf.constant(sample["image"]), segments)
    height, width = made.image.shape[:2]
    assert sizes[1].tolist() == [height, width]
    np.testing.assert_array_equal(images[1, :height, :width], made.image)
    np.testing.assert_array_equal(targets["masks"][1, :, :height, :width], masks_of(made.segments, 20))
    assert targets["masks"].shape == (4, 20, 80, 70)
    assert targets["labels"][1, : targets["num_objects"][1]].tolist() == labels.numpy().tolist()


def test_semantic_batches(shapes_set):
    changes = {"DATASET_MAPPER_NAME": "mask_former_semantic", "COLOR_AUG_SSD": True, "SIZE_DIVISIBILITY": SIZE}
    (batch,) = taken(1, shapes_set, config=config_of_shapes(**changes, CROP=CROP), max_objects=8)
    assert (batch["size"] == SIZE).all()
    for index in range(4):
        found = batch["labels"][index, : batch["num_objects"][index]]
        assert (np.diff(found) > 0).all()
        assert set(np.unique(batch["segments"][index])) - {NO_SEGMENT} == set(range(len(found)))


def test_per_pixel_batches(shapes_set):
    tree = recorded_recipes.official_tree("configs/ade20k-150/per_pixel_baseline_R50_bs16_160k.yaml")
    tree["DATASETS"]["TRAIN"], tree["MODEL"]["SEM_SEG_HEAD"]["NUM_CLASSES"] = ("shapes_train",), 7
    tree["INPUT"] |= {"MIN_SIZE_TRAIN": (40,), "CROP": CROP, "SIZE_DIVISIBILITY": 48}
    (batch,) = taken(1, shapes_set, config=tree)
    _, _, targets = training.step_arguments(batch)
    assert targets.keys() == {"sem_seg"}
    assert targets["sem_seg"].shape == (4, 48, 48)
    assert (targets["sem_seg"][:, 32:] == 255).all()
    assert set(np.unique(targets["sem_seg"])) <= {*range(7), 255}


def test_what_does_not_fit_is_refused(shapes_set, tmp_path):
    with pytest.raises(ValueError, match="the canvas is 64×63 px, expected at least 64×64"):
        taken(1, shapes_set, canvas=(64, 63))
    with pytest.raises(ValueError, match=r"shard is \(0, 3\) of a batch of 4 images"):
        taken(1, shapes_set, shard=(0, 3))
    for name in ("ade20k_panoptic", "coco_panoptic"):
        generated.write(name, tmp_path, "train", 1)
    with pytest.raises(DataError, match="7 classes of the config"):
        taken(1, open_dataset("ade20k_panoptic", tmp_path, "train"))
    tree = recorded_recipes.official_tree("configs/ade20k-150/maskformer_R50_bs16_160k.yaml")
    with pytest.raises(DataError, match="expected semantic maps, for the mapper mask_former_semantic"):
        taken(1, open_dataset("coco_panoptic", tmp_path, "train"), config=tree)
    tree = config_of_shapes()
    tree["DATALOADER"]["SAMPLER_TRAIN"] = "RepeatFactorTrainingSampler"
    with pytest.raises(ConfigError, match=r"'DATALOADER\.SAMPLER_TRAIN' is 'RepeatFactorTrainingSampler'"):
        taken(1, shapes_set, config=tree)
