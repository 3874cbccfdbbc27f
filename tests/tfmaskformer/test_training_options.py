"""``tfmaskformer train KEY VALUE``: what no training can have is refused by name, with exit code 2, before anything is written.

test_official_yaml.py has the values that the types tell; here are those too that recipe and mapper refuse.
"""

from __future__ import annotations

import pytest

from tests.tfmaskformer.training_processes import OPTIONS, arguments
from tfmaskformer.config import ConfigError
from tfmaskformer.data import shapes
from tfmaskformer.data.augmentation import mapper_of
from tfmaskformer.official_config import config_of, named_tree
from tfmaskformer.official_yaml import override
from tfmaskformer.training import cli, loop
from tfmaskformer.training.recipe import recipe_of
from tfmaskformer.training.run import RunError

WRONG = [
    ("SOLVER.BASE_LR", "0.0", "a positive number"),
    ("SOLVER.CHECKPOINT_PERIOD", "0", "a positive number"),
    ("SOLVER.STEPS", "(2, 1)", "ascending numbers"),
    ("INPUT.MIN_SIZE_TRAIN", "()", "at least one size"),
    ("INPUT.MIN_SIZE_TRAIN", "(-1,)", "at least one size"),
    ("INPUT.MIN_SIZE_TRAIN", f"({2**31},)", "below 2**31"),
    ("INPUT.MAX_SIZE_TRAIN", "0", "a size in px"),
    ("INPUT.MAX_SIZE_TRAIN", str(2**31), "below 2**31"),
    ("INPUT.DATASET_MAPPER_NAME", "mine", "one of"),
]
CROPS = [
    ("absolute", "(0.5, 0.5)", "whole numbers of px, as 'INPUT.CROP.TYPE' is 'absolute'"),
    ("absolute", "(32, 32.0)", "whole numbers of px"),
    ("absolute_range", "(32.5, 64)", "whole numbers of px, as 'INPUT.CROP.TYPE' is 'absolute_range'"),
    ("absolute_range", "(64, 32)", "the least and the largest side"),
    ("absolute", "(0, 32)", "numbers above 0"),
    ("absolute", f"(32, {2**31})", "below 2**31"),
    ("relative", "(0.5, 1.5)", "shares, 1 at most"),
    ("relative_range", "(32, 32)", "shares, 1 at most"),
]


def tree_of(*options):
    tree = named_tree("tiny_swin")[1]
    override(tree, [str(part) for item in OPTIONS.items() for part in item])
    override(tree, options)
    return tree


def checked(tree):
    """Of all parts that are made of it."""
    return config_of(tree, "mine"), recipe_of(tree), mapper_of(tree)


@pytest.mark.parametrize(("key", "text", "expected"), WRONG)
def test_values_that_nothing_can_be_made_of(key, text, expected):
    with pytest.raises(ConfigError) as refused:
        checked(tree_of(key, text))
    assert f"'{key}' is " in str(refused.value)
    assert expected in str(refused.value)


@pytest.mark.parametrize(("kind", "size", "expected"), CROPS)
def test_crops_that_there_are_not(kind, size, expected):
    crop = ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", kind, "INPUT.CROP.SIZE"]
    with pytest.raises(ConfigError) as refused:
        checked(tree_of(*crop, size))
    assert f"'INPUT.CROP.SIZE' is {size}" in str(refused.value)
    assert expected in str(refused.value)
    good = (0.5, 1) if "relative" in kind else (32, 64)
    assert checked(tree_of(*crop, str(good)))[2].crop_size == good


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write(folder, "train", 1)
    shapes.write(folder, "val", 1)
    return folder


REFUSED = {
    "SOLVER.BASE_LR": ("None", "is None, expected float as in the default 0.001"),
    "SOLVER.GAMMA": ("1e400", "is inf, expected finite numbers"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": ("None", "is None, expected float"),
    "SOLVER.STEPS": ("('a',)", "is ('a',), expected tuple of int"),
    "TEST.EVAL_PERIOD": ("None", "is None, expected int"),
    "SEED": ("5000000000", "is 5000000000, expected a number below 2**32"),
    "INPUT.MIN_SIZE_TRAIN": ("(64.5,)", "is (64.5,), expected tuple of int"),
    "INPUT.MAX_SIZE_TRAIN": ("None", "is None, expected int"),
    "INPUT.CROP.SIZE": ("(64,)", "is [64], expected two numbers"),
    "DATASETS.TRAIN": ("None", "is None, expected tuple"),
    "MODEL.PIXEL_STD": ("[0.0,1.0,1.0]", "is [0.0, 1.0, 1.0], expected three numbers above 0"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_the_command_refuses_them(key, data, tmp_path, capsys):
    text, message = REFUSED[key]
    assert cli.main(arguments(data, tmp_path / "run", **{key: text})) == cli.BAD_INPUT
    told = capsys.readouterr()
    assert told.err == f"error: options: '{key}' {message}" + told.err.partition(message)[2]
    assert told.out == ""
    assert not (tmp_path / "run").exists()


def test_the_command_refuses_what_the_mapper_cannot_do(data, tmp_path, capsys):
    crop = {"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "absolute", "INPUT.CROP.SIZE": "(0.5,0.5)"}
    assert cli.main(arguments(data, tmp_path / "run", **crop)) == cli.BAD_INPUT
    assert "error: input: 'INPUT.CROP.SIZE' is (0.5, 0.5), expected whole numbers of px" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_refuses_a_file(data, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("SOLVER: {BASE_LR: null}")
    command = arguments(data, tmp_path / "run")
    command[command.index("--config") + 1] = str(file)
    assert cli.main(command) == cli.BAD_INPUT
    assert f"error: config '{file}': 'SOLVER.BASE_LR' is None, expected float as in the default 0.001" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_seeds(data, tmp_path, monkeypatch):
    """Up to the largest; and below 0 is upstream's word for any, which is 0 here."""
    seeds = []

    def training(settings, *rest, **more):
        seeds.append(settings.seed)
        raise RunError("enough")

    monkeypatch.setattr(loop, "Training", training)
    for seed in (2**32 - 1, -1, -7):
        assert cli.main(arguments(data, tmp_path / "run", SEED=seed)) == cli.BAD_INPUT
    assert seeds == [2**32 - 1, 0, 0]
