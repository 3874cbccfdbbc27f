"""YAML configs: merged as Detectron2 merges them, and nothing in them is run."""

from __future__ import annotations

import ast
import json
import os
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from checkpoints import registry
from parity.record_defaults import changes
from tfmaskformer.config import ConfigError
from tfmaskformer.official_config import named_tree
from tfmaskformer.official_yaml import MAX_FILE_BYTES, decode, defaults, dump, evaluate, override, read_tree

GOLDEN = Path(__file__).parents[2] / "tfmaskformer" / "official_configs.json"


def value_of(tree, key):
    for part in key.split("."):
        tree = tree[part]
    return tree


def assert_same(found, expected, where=""):
    """Equal, down to the types: a tuple is no list, 1 is not 1.0."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    else:
        assert repr(found) == repr(expected), where


@pytest.fixture
def write(tmp_path):
    def write(text, name="config.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_every_official_file_is_read_as_the_official_code_reads_it(official_sources):
    from parity import official, record_defaults

    code = official.load(*official_sources)
    cfg = record_defaults.official_defaults()
    assert_same(defaults(), record_defaults.tree(cfg))
    files = sorted(code.maskformer.glob("configs/**/*.yaml"))
    recorded = json.loads(GOLDEN.read_text())["configs"]
    assert len(files) == len(recorded) == 36
    for path in files:
        cfg = record_defaults.official_defaults()
        with official._quiet():
            cfg.merge_from_file(str(path))
        tree = read_tree(path)
        assert_same(tree, record_defaults.tree(cfg))
        assert_same(
            changes(tree, defaults()), {key: decode(value) for key, value in recorded[str(path.relative_to(code.maskformer))].items()}
        )


def test_bases_and_literals(write):
    write("MODEL: {SEM_SEG_HEAD: {NUM_CLASSES: 7, CONVS_DIM: 64}}\nINPUT: {FORMAT: 'RGB'}\nVERSION: 2", "base/base.yaml")
    write(
        "_BASE_: base/base.yaml\nMODEL: {SEM_SEG_HEAD: {NUM_CLASSES: 8}}\nSOLVER: {STEPS: '(10, 20)', WARMUP_FACTOR: 1e-6}", "middle.yaml"
    )
    path = write(
        "_BASE_: ../middle.yaml\n"
        "MODEL:\n  PIXEL_STD: (1.5, 2.5, 3.5)\n"
        "DATASETS: {TRAIN: ['mine']}\n"
        'INPUT: {MIN_SIZE_TRAIN: !!python/object/apply:eval ["[int(x * 0.1 * 640) for x in range(5, 8)]"]}\n',
        "deep/config.yaml",
    )
    expected = {
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 8,
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": 64,
        "MODEL.PIXEL_STD": [1.5, 2.5, 3.5],
        "INPUT.FORMAT": "RGB",
        "INPUT.MIN_SIZE_TRAIN": (320, 384, 448),
        "SOLVER.STEPS": (10, 20),
        "SOLVER.WARMUP_FACTOR": 1e-06,
        "DATASETS.TRAIN": ("mine",),
    }
    tree = read_tree(path)
    found = changes(tree, defaults())
    assert found == expected
    for key, value in expected.items():
        assert type(value_of(tree, key)) is type(value)


def test_later_bases_go_over_earlier_ones_and_the_file_over_both(write):
    write("SOLVER: {BASE_LR: 0.5, MAX_ITER: 5, GAMMA: 0.5}", "first.yaml")
    write("SOLVER: {BASE_LR: 0.6, MAX_ITER: 6}", "second.yaml")
    tree = read_tree(write("_BASE_: [first.yaml, second.yaml]\nSOLVER: {BASE_LR: 0.7}"))
    assert changes(tree, defaults()) == {"SOLVER.BASE_LR": 0.7, "SOLVER.MAX_ITER": 6, "SOLVER.GAMMA": 0.5}


def test_aliases_of_a_sane_number_are_fine(write):
    tree = read_tree(write("INPUT: &input {MIN_SIZE_TRAIN: [1, 2], CROP: {ENABLED: true}}\n"))
    assert tree["INPUT"]["MIN_SIZE_TRAIN"] == (1, 2)
    tree = read_tree(write("TEST: {AUG: {MIN_SIZES: &sizes [1, 2]}}\nINPUT: {MIN_SIZE_TRAIN: *sizes}"))
    assert tree["INPUT"]["MIN_SIZE_TRAIN"] == tree["TEST"]["AUG"]["MIN_SIZES"] == (1, 2)


def test_trees_share_nothing(write):
    path = write("VERSION: 2")
    read_tree(path)["MODEL"]["PIXEL_MEAN"].append(1)
    assert len(read_tree(path)["MODEL"]["PIXEL_MEAN"]) == 3


@pytest.mark.parametrize(
    "expression",
    [
        "[int(x * 0.1 * 640) for x in range(5, 21)]",
        "[int(x * 0.1 * 2048) for x in range(5, 21)]",
        "[x for x in range(3)]",
        "[-x + 2 / 4 - 1.5 for x in range(10, 0, -3)]",
        "[2 * (x - 1) for x in range(-1, 2 + 1)]",
        "[1 for x in range(5, 2)]",
    ],
)
def test_expressions_give_what_python_gives(expression):
    found = evaluate(expression)
    expected = eval(expression, {"__builtins__": {"range": range, "int": int}})  # written above, by us
    assert found == expected
    assert list(map(type, found)) == list(map(type, expected))


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("__import__('os').system('touch was-run')", "which is not read"),
        ("[__import__('os') for x in range(3)]", r"'__import__\('os'\)', which is not read"),
        ("[x.real for x in range(3)]", r"'x\.real'"),
        ("[y for x in range(3)]", "'y'"),
        ("[x for x in range(3) if x]", "which is not read"),
        ("[x for x in range(3) for y in range(3)]", "which is not read"),
        ("[x for x in [1, 2]]", r"'\[1, 2\]'"),
        ("[x for x in open('file')]", "open"),
        ("[x for x in range(10**9)]", r"'10 \*\* 9'"),
        ("[x for x in range(100000000)]", "with 100000000 items, expected at most 1000"),
        ("[x for x in range(0, 5, 0)]", "a step that is not 0"),
        ("[x for x in range(0.5)]", "expected whole numbers"),
        ("[x for x in range()]", r"'range\(\)'"),
        ("[x for x in range(*[1])]", "which is not read"),
        ("[x for x in range(stop=1)]", "which is not read"),
        ("[int(x, 2) for x in range(3)]", "which is not read"),
        ("[int(*x) for x in range(3)]", "which is not read"),
        ("[(lambda: x)() for x in range(3)]", "which is not read"),
        ("[1 / x for x in range(3)]", "a division by zero in '1 / x'"),
        ("[x * 1e308 * 10 for x in range(3)]", r"beyond ±1e\+09"),
        ("[int(1e999) for x in range(3)]", r"beyond ±1e\+09"),
        ("[True for x in range(3)]", "'True'"),
        ("['a' for x in range(3)]", "'a'"),
        ("[x async for x in range(3)]", "which is not read|no Python expression"),
        ("{x for x in range(3)}", "which is not read"),
        ("[x for x in range(3)", "no Python expression"),
        ("(" * 199, "no Python expression"),
        ("1 " * 101, "an expression of 202 characters"),
        ("\0", "no Python expression"),
    ],
)
def test_expressions_that_are_refused(expression, message):
    with pytest.raises(ValueError, match=message):
        evaluate(expression)


FLOAT, INT, INTS = "expected float as in the default ", "expected int as in the default ", "expected tuple of int as in the default "
FINITE = "expected finite numbers that fit in 64 bits"
PIXELS = "expected a size in px, below 2**31"
NAMES = "expected names of data sets"

WRONG = [
    ("SOLVER.BASE_LR", "None", "is None, " + FLOAT + "0.001"),
    ("SOLVER.CHECKPOINT_PERIOD", "None", "is None, " + INT + "5000"),
    ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "None", "is None, " + FLOAT + "1.0"),
    ("SOLVER.LR_SCHEDULER_NAME", "None", "is None, expected str as in the default 'WarmupMultiStepLR'"),
    ("TEST.EVAL_PERIOD", "None", "is None, " + INT + "0"),
    ("SEED", "None", "is None, " + INT + "-1"),
    ("SEED", "1.0", "is 1.0, " + INT + "-1"),
    ("SEED", "5000000000", "is 5000000000, expected a number below 2**32"),
    ("SEED", str(2**32), f"is {2**32}, expected a number below 2**32"),
    ("SOLVER.STEPS", "None", "is None, " + INTS + "(30000,)"),
    ("SOLVER.STEPS", "('a',)", "is ('a',), " + INTS + "(30000,)"),
    ("SOLVER.STEPS", "(1, None)", "is (1, None), " + INTS + "(30000,)"),
    ("SOLVER.STEPS", "(True,)", "is (True,), " + INTS + "(30000,)"),
    ("INPUT.MIN_SIZE_TRAIN", "('a',)", "is ('a',), " + INTS + "(800,)"),
    ("INPUT.MIN_SIZE_TRAIN", "(64.5,)", "is (64.5,), " + INTS + "(800,)"),
    ("INPUT.MIN_SIZE_TRAIN", "((64,),)", "is ((64,),), " + INTS + "(800,)"),
    ("INPUT.MIN_SIZE_TRAIN", "64", "is 64, " + INTS + "(800,)"),
    ("INPUT.MAX_SIZE_TRAIN", "None", "is None, " + INT + "1333"),
    ("INPUT.MAX_SIZE_TEST", "0", "is 0, " + PIXELS),
    ("INPUT.MIN_SIZE_TEST", "-1", "is -1, " + PIXELS),
    ("INPUT.MIN_SIZE_TEST", str(2**31), f"is {2**31}, " + PIXELS),
    ("INPUT.SIZE_DIVISIBILITY", "32769", "is 32769, expected a size in px, 32768 at most"),
    ("MODEL.MASK_FORMER.SIZE_DIVISIBILITY", "32769", "is 32769, expected a size in px, 32768 at most"),
    ("INPUT.CROP.SIZE", "(64,)", "is [64], expected two numbers"),
    ("INPUT.CROP.SIZE", "(64, 64, 64)", "is [64, 64, 64], expected two numbers"),
    ("INPUT.CROP.SIZE", "('a', 'b')", "is ['a', 'b'], expected list of float as in the default [0.9, 0.9]"),
    ("DATASETS.TRAIN", "None", "is None, expected tuple as in the default ()"),
    ("DATASETS.TRAIN", "shapes_train", "is 'shapes_train', expected tuple as in the default ()"),
    ("DATASETS.TRAIN", "([1],)", "is ([1],), " + NAMES),
    ("DATASETS.TEST", "(None,)", "is (None,), " + NAMES),
    ("MODEL.PIXEL_MEAN", "[1.0, 2.0]", "is [1.0, 2.0], expected three numbers"),
    ("MODEL.PIXEL_STD", "[0.0, 1.0, 1.0]", "is [0.0, 1.0, 1.0], expected three numbers above 0"),
    ("MODEL.PIXEL_STD", "[1.0, 1.0, -1.0]", "is [1.0, 1.0, -1.0], expected three numbers above 0"),
    ("MODEL.PIXEL_STD", "[1.0, 1.0]", "is [1.0, 1.0], expected three numbers above 0"),
    ("MODEL.PIXEL_STD", "[1e400, 1.0, 1.0]", "is [inf, 1.0, 1.0], " + FINITE),
    ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[0, 0, 0, 0]", "is [0, 0, 0, 0], expected list of bool as in the default [False, "),
    ("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", str(2**31), f"is {2**31}, expected an integer of 32 bits"),
    ("MODEL.ANCHOR_GENERATOR.SIZES", "[[0.5]]", "is [[0.5]], expected list of list of int as in the default [[32, 64, 128, 256, 512]]"),
    ("SOLVER.BASE_LR", "1e400", "is inf, " + FINITE),
    ("SOLVER.BASE_LR", "-1e400", "is -inf, " + FINITE),
    ("SOLVER.MAX_ITER", str(2**63), f"is {2**63}, " + FINITE),
    ("TEST.EXPECTED_RESULTS", "[1j]", "is [1j], expected list as in the default []"),
    ("TEST.EXPECTED_RESULTS", "[['PQ', 1e400]]", "is [['PQ', inf]], " + FINITE),
    ("VERSION", "1", "is 1, expected 2"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text", "message"), WRONG, ids=lambda item: item[:40])
def test_what_no_key_can_be(key, text, message, write):
    """As an option, after other options of the same key, as text in a file, and as a value of YAML's own. The config stays as it was."""
    tree = defaults()
    for options in ([key, text], [key, value_of(defaults(), key), key, text], [key, decode(text)]):
        with pytest.raises(ConfigError) as refused:
            override(tree, options)
        assert str(refused.value).startswith(f"options: '{key}' {message}")
        assert_same(tree, defaults())
    *parents, last = key.split(".")
    yaml_value = text if "None" not in text and "(" not in text and "1e400" not in text and "1j" not in text else f'"{text}"'
    for value in {yaml_value, f'"{text}"'}:
        path = write(
            "".join(f"{'  ' * depth}{parent}:\n" for depth, parent in enumerate(parents)) + f"{'  ' * len(parents)}{last}: {value}"
        )
        with pytest.raises(ConfigError) as refused:
            read_tree(path)
        assert str(refused.value).startswith(f"config '{path}': '{key}' {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SOLVER: {BASE_LR: null}", "'SOLVER.BASE_LR' is None, expected float"),
        ("SOLVER: {BASE_LR: .inf}", "'SOLVER.BASE_LR' is inf, expected finite"),
        ("SOLVER: {BASE_LR: .nan}", "'SOLVER.BASE_LR' is nan, expected finite"),
        ("INPUT: {MIN_SIZE_TRAIN: [a]}", r"'INPUT.MIN_SIZE_TRAIN' is \('a',\), expected tuple of int"),
        ("INPUT: {MIN_SIZE_TRAIN: [{a: 1}]}", r"'INPUT.MIN_SIZE_TRAIN' is \({'a': 1},\), expected tuple of int"),
    ],
)
def test_what_only_yaml_can_write(text, message, write):
    with pytest.raises(ConfigError, match=rf"^config '.*': {message}"):
        read_tree(write(text))


def test_what_keys_can_be():
    """None where the default is None, whole numbers for fractions in a list, items of any kind where the default has none."""
    options = {
        "MODEL.SWIN.QK_SCALE": [None, 0.5, None],
        "SOLVER.WEIGHT_DECAY_BIAS": [0.0, None],
        "SOLVER.STEPS": [(), (1, 2), [3]],
        "INPUT.CROP.SIZE": [[512, 512], (0.5, 1)],
        "MODEL.PIXEL_STD": [[1, 1, 1]],
        "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": [[[1, 1, 1, 1]]],
        "TEST.EXPECTED_RESULTS": [[["PQ", None, 46.5, 1]]],
        "SEED": [-5, 0, 2**32 - 1],
        "INPUT.MIN_SIZE_TEST": [0],
        "SOLVER.CHECKPOINT_PERIOD": [10**12],
        "DATASETS.TRAIN": [["mine", "yours"], ()],
    }
    for key, values in options.items():
        tree = defaults()
        for value in values:
            override(tree, [key, repr(value)])
            kind = type(value_of(defaults(), key))
            assert value_of(tree, key) == (kind(value) if isinstance(value, list | tuple) else value)


@pytest.mark.parametrize("entry", registry.entries(), ids=lambda entry: entry.name)
def test_whole_configs_are_read_again(entry, write):
    tree = named_tree(entry.name)[1]
    assert_same(read_tree(write(dump(tree))), tree)


APPLY = "!!python/object/apply:"
MODEL = "MODEL: {SEM_SEG_HEAD: {NUM_CLASSES: 3}}\nINPUT: {MIN_SIZE_TRAIN: %s}"

EVIL = {
    "os.system": (MODEL % f"{APPLY}os.system ['touch was-run']", r"line 2: '!!python/object/apply:os\.system' is not read"),
    "subprocess": (f"x: {APPLY}subprocess.Popen [[touch, was-run]]", r"'!!python/object/apply:subprocess\.Popen' is not read"),
    "builtins.eval": (f"x: {APPLY}builtins.eval ['1']", r"apply:builtins\.eval' is not read"),
    "exec": (f"x: {APPLY}exec ['import os']", "apply:exec' is not read"),
    "name": ("x: !!python/name:os.system", r"'!!python/name:os\.system' is not read"),
    "module": ("x: !!python/module:this", "'!!python/module:this' is not read"),
    "object": ("x: !!python/object:os._wrap_close {a: 1}", "is not read"),
    "object/new": ("x: !!python/object/new:os.system ['touch was-run']", "is not read"),
    "tuple": ("x: !!python/tuple [1, 2]", "'!!python/tuple' is not read"),
    "unknown tag": ("x: !mine 3", "could not determine a constructor for the tag '!mine'"),
    "import in eval": (MODEL % f"""{APPLY}eval ["__import__('os').system('touch was-run')"]""", r"'__import__\('os'\).*which is not read"),
    "import inside the loop": (
        MODEL % f"""{APPLY}eval ["[__import__('os').system('touch was-run') for x in range(3)]"]""",
        "Python is not run",
    ),
    "eval inside eval": (MODEL % f"{APPLY}eval ['[eval(\"1\") for x in range(3)]']", r"eval\('1'\)', which is not read"),
    "eval with globals": (MODEL % f"{APPLY}eval ['[1 for x in range(3)]', {{}}]", "Python is not run"),
    "eval with keywords": (MODEL % f"{APPLY}eval {{args: ['1']}}", "Python is not run"),
    "eval of a node with a tag": (MODEL % f"{APPLY}eval [{APPLY}os.system ['touch was-run']]", "Python is not run"),
    "giant range": (MODEL % f"{APPLY}eval ['[x for x in range(999999999999)]']", "beyond ±1e"),
    "giant power": (MODEL % f"{APPLY}eval ['[9 ** 9 ** 9 ** 9 for x in range(3)]']", "which is not read"),
    "tag in a base": ("_BASE_: evil-base.yaml", r"evil-base\.yaml', the base of '.*', line 1: '!!python/name:os\.system' is not read"),
    "billion laughs": (
        "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)),
        "more than 10000 values, counting what its aliases stand for",
    ),
    "billion laughs by merge keys": (
        "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 12)),
        "more than 10000 values",
    ),
    "alias in itself": ("&a MODEL: &b [*b]", "more than 10000 values"),
    "nested lists": ("x: " + "[" * 40_000, "line 1: brackets are nested more than 20 deep"),
    "nested mappings": ("{a: " * 2_000 + "1" + "}" * 2_000, "line 1: brackets are nested more than 20 deep"),
    "nested lists without brackets": ("x:\n" + "- " * 40_000, "nested too deeply"),
    "nested mappings without brackets": ("? " * 40_000, "nested too deeply"),
    "nested literal": ("MODEL: {WEIGHTS: '" + "(" * 900 + "'}\nVERSION: 3", "'VERSION' is 3"),
    "long literal": ("MODEL: {WEIGHTS: '" + "-" * 50_000 + "1'}", "'MODEL.WEIGHTS' is text of 50001 characters, expected at most 1000"),
    "long number": ("VERSION: " + "9" * 50_000, "a value that YAML does not allow: Exceeds the limit"),
    "date that is none": ("VERSION: 2001-99-99", "a value that YAML does not allow: month must be in"),
    "list as a key": ("? [1, 2]\n: 3", "found unhashable key"),
    "key twice": ("VERSION: 2\nMODEL: {DEVICE: cpu, DEVICE: cuda}", "line 2: the key 'DEVICE' occurs 2 times"),
    "large file": (b"#" * (MAX_FILE_BYTES + 1), "more than 100000 bytes"),
    "not UTF-8": (b"MODEL: \xff\xfe", "no UTF-8 text: byte 7 is 0xff"),
    "control characters": (b"MODEL: \x00", "special characters are not allowed"),
    "two documents": ("VERSION: 2\n---\nVERSION: 2", "but found another document"),
    "no YAML": ("MODEL: [", "line 1: expected the node content"),
    "pickle": (b"\x80\x04N.", "no UTF-8 text"),
    "empty": ("", "is empty"),
    "only a comment": ("# nothing", "is empty"),
    "a list": ("[1, 2]", r"holds \[1, 2\], expected keys"),
    "a text": ("hello", "holds 'hello', expected keys"),
    "own base": ("_BASE_: config.yaml", r"it is its own base: config\.yaml → config\.yaml"),
    "bases in a circle": ("_BASE_: circle.yaml", r"it is its own base: config\.yaml → circle\.yaml → config\.yaml"),
    "missing base": ("_BASE_: none.yaml", r"none\.yaml', the base of '.*config\.yaml' does not exist"),
    "base that is a directory": ("_BASE_: ..", "is a directory, expected a YAML file"),
    "base that is a device": ("_BASE_: /dev/zero", "does not exist, or is no regular file"),
    "base of the net": ("_BASE_: https://example.com/a.yaml", "'_BASE_' is 'https://example.com/a.yaml', expected the path of a file"),
    "base of another user": ("_BASE_: ~nobody-has-this-name/a.yaml", "does not exist"),
    "base that is a number": ("_BASE_: 3", "'_BASE_' is 3, expected the path"),
    "base with a zero byte": ('_BASE_: "a\\0b"', "does not exist"),
    "many bases": ("_BASE_: [" + ", ".join(["fine.yaml"] * 60) + "]", "more than 50 bases"),
    "unknown key": ("MODEL: {SEM_SEG_HAED: {NUM_CLASSES: 3}}", "unknown key 'MODEL.SEM_SEG_HAED'; nearest: MODEL.SEM_SEG_HEAD"),
    "key that is a number": ("1: 2", "unknown key '1'"),
    "base below": ("MODEL: {_BASE_: fine.yaml}", "unknown key 'MODEL._BASE_'"),
    "whole number for a fraction": ("SOLVER: {BASE_LR: 1}", "'SOLVER.BASE_LR' is 1, expected float as in the default 0.001"),
    "yes for a number": ("MODEL: {RESNETS: {DEPTH: true}}", "'MODEL.RESNETS.DEPTH' is True, expected int"),
    "keys for a value": ("MODEL: {RESNETS: {DEPTH: {a: 1}}}", r"'MODEL\.RESNETS\.DEPTH' is keys \(a, …\), expected int"),
    "value for keys": ("MODEL: 3", "'MODEL' is 3, expected keys"),
    "keys in a text": ("MODEL: '{\"RESNETS\": 3}'", "'MODEL' is keys .*, expected keys"),
    "keys over a value of the base": ("_BASE_: fine.yaml\nVERSION: {a: 1}", "'VERSION' has keys, but is 2 in the base"),
    "old version": ("VERSION: 1", "'VERSION' is 1, expected 2"),
}

WATCHED: list[str] | None = None


def watch(event, arguments):
    if WATCHED is not None and event.startswith(
        ("import", "exec", "os.", "subprocess.", "socket.", "ctypes.", "pickle.", "shutil.", "marshal.")
    ):
        WATCHED.append(f"{event} {arguments}")


@pytest.fixture(scope="module")
def audit():
    """Python's own audit hook, which cannot be taken away again; it only looks while a test asks for it."""
    sys.addaudithook(watch)
    defaults()
    ast.literal_eval("1")


@pytest.mark.parametrize("name", EVIL)
def test_evil_files_run_nothing_and_are_told(name, audit, write, tmp_path, monkeypatch):
    global WATCHED
    monkeypatch.chdir(tmp_path)
    text, message = EVIL[name]
    write("x: !!python/name:os.system", "evil-base.yaml")
    write("_BASE_: config.yaml", "circle.yaml")
    write("VERSION: 2", "fine.yaml")
    path = write(text)
    files = set(os.listdir(tmp_path))
    start_s = time.monotonic()
    tracemalloc.start()
    WATCHED = []
    try:
        with pytest.raises(ConfigError, match=message) as refused:
            read_tree(path)
        events = WATCHED
    finally:
        WATCHED = None
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert events == []
    assert set(os.listdir(tmp_path)) == files
    assert peak_bytes < 100e6
    assert time.monotonic() - start_s < 60
    assert len(str(refused.value)) < 600
    assert "config.yaml" in str(refused.value)


def test_no_file_at_all(tmp_path):
    with pytest.raises(ConfigError, match=r"^config '[^']*none\.yaml' does not exist"):
        read_tree(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"^config '[^']*' is a directory"):
        read_tree(tmp_path)


def test_the_audit_sees_what_an_unsafe_loader_would_run(audit, tmp_path, monkeypatch):
    import yaml

    global WATCHED
    monkeypatch.chdir(tmp_path)
    WATCHED = []
    try:
        yaml.unsafe_load(EVIL["os.system"][0])
        events = WATCHED
    finally:
        WATCHED = None
    assert any(event.startswith("os.system") for event in events)
    assert (tmp_path / "was-run").exists()
