"""TensorFlow Model Garden: the same steps as ``tfmaskformer train``, and what it saves.

Most of it needs the Model Garden, which docs/model_garden.md tells how to install; CI has it not.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import tfmaskformer
from checkpoints import registry
from converters import cli as convert
from tests.tfmaskformer import training_processes
from tests.tfmaskformer.test_training_loop import processes
from tests.tfmaskformer.training_processes import arguments
from tfmaskformer.data import shapes
from tfmaskformer.evaluation import cli as evaluation_cli
from tfmaskformer.model_garden import __main__ as driver
from tfmaskformer.module import named_variables
from tfmaskformer.training import cli

LOSSES = [f"loss_{term}{layer}" for term in ("ce", "mask", "dice") for layer in ("", "_0")]
TAGS = {"training_loss": "total_loss"} | {name: name for name in (*LOSSES, "gradient_norm", "dropped_objects")}
"""What the Model Garden logs → the curve of ``tfmaskformer train``."""
STEPS = 4

pytestmark = pytest.mark.filterwarnings("ignore")  # of the Model Garden and what it imports


@pytest.fixture(scope="module")
def task():
    pytest.importorskip("official.core", reason="needs TensorFlow Model Garden: docs/model_garden.md", exc_type=ImportError)
    return importlib.import_module("tfmaskformer.model_garden.task")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write(folder, "train", 10)
    shapes.write(folder, "val", 3)
    return folder


@pytest.fixture(scope="module")
def ours(task, data, tmp_path_factory, uncompiled):
    """The folder of ``tfmaskformer train``. With dropout and stochastic depth."""
    folder = tmp_path_factory.mktemp("ours") / "run"
    assert cli.main(arguments(data, folder, SOLVER__MAX_ITER=STEPS)) == cli.OK
    return folder


@pytest.fixture(scope="module")
def garden(task, data, tmp_path_factory, uncompiled):
    """The folder of the Model Garden's training, the numbers that it logged, and its model."""
    folder = tmp_path_factory.mktemp("garden") / "run"
    return folder, *train(task, data, folder)


def parameters(task, data, *, steps=STEPS, options=(), runtime=(), **trainer):
    params = task.experiment("tiny_swin")
    options = training_processes.OPTIONS | dict(options)
    model = {"options": [part for key, value in options.items() if key not in task.PLACES for part in (key, str(value))]}
    train_data = {"input_path": str(data), "global_batch_size": 4}
    params.override(
        {
            "task": {"model": model, "max_iter": steps, "train_data": train_data, "validation_data": {"input_path": str(data)}},
            "trainer": {"train_steps": steps, "steps_per_loop": 1, "summary_interval": 1, "checkpoint_interval": 2, **trainer},
            "runtime": dict(runtime),
        }
    )
    params.validate()
    return params


def train(task, data, folder, mode="train", **trainer):
    """Each step's numbers and the model; of an evaluation, its results."""
    from official.common import distribute_utils
    from official.core import task_factory, train_lib

    params, logged = parameters(task, data, **trainer), []
    strategy = distribute_utils.get_distribution_strategy(params.runtime.distribution_strategy, num_gpus=params.runtime.num_gpus)
    with strategy.scope():
        made = task_factory.get_task(params.task, logging_dir=str(folder))
    action = [lambda output: logged.append({name: float(value) for name, value in output.items()})]
    model, found = train_lib.run_experiment(strategy, made, mode, params, str(folder), run_post_eval=mode == "eval", train_actions=action)
    return found if mode == "eval" else (logged, model)


def curves(folder):
    """Tag → step → value, of a folder's event files; TensorFlow writes scalars as tensors."""
    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.iterdir()):
        for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                number = tf.make_ndarray(value.tensor) if value.HasField("tensor") else value.simple_value
                found.setdefault(value.tag, {})[event.step] = number
    return found


def written(params, folder):
    """The parameters as a ``--config_file``."""
    file = folder / "values.yaml"
    file.write_text(str(params.as_dict()).replace("None", "null"))
    return file


def tensors(folder):
    """Of model and optimizer in a folder's last checkpoint."""
    reader = tf.train.load_checkpoint(str(folder))
    keys = reader.get_variable_to_shape_map()
    return {key: reader.get_tensor(key) for key in keys if key.startswith(("model/", "optimizer/"))}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_every_official_entry_is_an_experiment(task):
    from official.core import exp_factory

    for entry in registry.entries():
        params = exp_factory.get_exp_config(entry.name)
        params.validate()
        settings = task.settings_of(params.task)
        assert settings.config.to_dict() == entry.config
        assert settings.recipe.max_iter == params.trainer.train_steps == params.task.max_iter
        assert settings.recipe.ims_per_batch == params.task.train_data.global_batch_size
    params.task.train_data.seed = -1
    assert task.settings_of(params.task).seed == 0  # as tfmaskformer train


def assert_close(found, expected, rel):
    """Curves of the Model Garden, and of ``tfmaskformer train``; they may differ relatively by as much in each step."""
    for name, tag in TAGS.items():
        if tag in expected or name in found:
            assert found[name] == {step: pytest.approx(expected[tag][step], rel=by, abs=0) for step, by in rel.items()}, name
    assert found.keys() >= {"training_loss", "loss_ce", "gradient_norm", "dropped_objects"}


def test_one_program(task, data, tmp_path, monkeypatch):
    """``enable_xla`` for one GPU; what is for one that is not there TensorFlow puts on the CPU. Before ``tf.function`` is replaced."""
    function, compiled = tf.function, []

    def seen(python_function=None, **options):
        compiled.extend([python_function.__name__] if options.get("jit_compile") else [])
        return function(python_function, **options)

    options = {key.replace("__", "."): value for key, value in training_processes.QUICK.items()}
    with monkeypatch.context() as patch:
        patch.setattr(tf, "function", seen)
        train(task, data, tmp_path / "run", steps=2, options=options, runtime={"distribution_strategy": "one_device", "num_gpus": 1})
    assert compiled == ["train_step"]
    quick = training_processes.QUICK | {"SOLVER__MAX_ITER": 2, "SOLVER__CHECKPOINT_PERIOD": 1, "DATASETS__TEST": "()"}
    assert cli.main(arguments(data, tmp_path / "ours", **quick)) == cli.OK
    assert_close(curves(tmp_path / "run" / "train"), curves(tmp_path / "ours" / "events"), {1: 1e-5, 2: 1e-3})


def test_bfloat16(task, data, tmp_path, uncompiled):
    from official.modeling import performance

    assert cli.main(arguments(data, tmp_path / "ours", "--bfloat16", SOLVER__MAX_ITER=2, DATASETS__TEST="()")) == cli.OK
    params = parameters(task, data, steps=2, runtime={"mixed_precision_dtype": "bfloat16"})
    try:
        assert driver.main([*command(data, tmp_path / "run")[:6], "--config_file", str(written(params, tmp_path))]) == driver.OK
    finally:
        performance.set_mixed_precision_policy("float32")
    assert_close(curves(tmp_path / "run" / "train"), curves(tmp_path / "ours" / "events"), {1: 0, 2: 0})
    assert_same(tensors(tmp_path / "run"), tensors(tmp_path / "ours"))
    made = task.MaskFormerTask(params.task, str(tmp_path / "other"))
    made.build_model()
    with pytest.raises(task.ConfigError, match="is 'bfloat16', and the model computes in float32"):
        made.create_optimizer(params.trainer.optimizer_config, params.runtime)


def test_replicas_and_workers(task, data, tmp_path):
    """Two replicas, and two workers, which are stopped after two steps and go on."""
    params = parameters(task, data, steps=3, validation_interval=3)
    params.override({"task": {"train_data": {"max_objects": 3}}})
    written(params, tmp_path)
    processes("model_garden", data, tmp_path)
    expected = curves(tmp_path / "two" / "events")
    assert expected["dropped_objects"][3] > 0
    metrics = json.loads((tmp_path / "two" / "evaluation-3.json").read_text())["metrics"]
    for name, rel in (("replicas", {1: 0, 2: 0, 3: 0}), ("workers", {1: 1e-5, 2: 1e-3, 3: 1e-2})):
        assert_close(curves(tmp_path / name / "train"), expected, rel)
        found = curves(tmp_path / name / "validation")
        assert found["skipped_images"][3] == 0
        assert found["PQ"][3] == pytest.approx(metrics["panoptic"]["all"]["pq"], abs=1e-5)
        assert found["mIoU"][3] == pytest.approx(metrics["semantic"]["miou"], abs=1e-5)
    found = {name: tensors(tmp_path / name) for name in ("two", "replicas", "workers")}
    assert_same(found["replicas"], found["two"])
    assert found["workers"].keys() == found["two"].keys()
    for key, value in found["two"].items():
        np.testing.assert_allclose(found["workers"][key], value, rtol=1e-2, atol=1e-4, err_msg=key)
    for name in ("train", "validation"):  # of the first worker alone, before and after
        assert len(list((tmp_path / "workers" / name).iterdir())) == 2


def test_the_same_numbers_step_for_step(ours, garden):
    """Every loss, gradient norm, learning rate; weights and moments after the last step: bit for bit."""
    _, logged, _ = garden
    expected = curves(ours / "events")
    assert len(logged) == STEPS
    for step, numbers in enumerate(logged, 1):
        assert numbers.keys() == {*TAGS, "learning_rate"}
        for name, tag in TAGS.items():
            assert np.float32(numbers[name]) == np.float32(expected[tag][step]), (step, name)
        if step < STEPS:  # the Model Garden tells that of the next step
            assert np.float32(numbers["learning_rate"]) == np.float32(expected["lr"][step + 1])
    assert len({numbers["training_loss"] for numbers in logged}) == STEPS
    found = tensors(garden[0])
    assert len(found) > 300
    assert_same(found, tensors(ours))


def test_what_it_saves_reloads_whole(garden, tmp_path):
    folder, _, model = garden
    trained = {name: variable.numpy() for name, variable in named_variables(model).items()}
    assert_same({name: variable.numpy() for name, variable in named_variables(tfmaskformer.load(folder)).items()}, trained)
    for source, destination in ((folder, tmp_path / "model.pkl"), (tmp_path / "model.pkl", tmp_path / "back")):
        assert convert.main(["--src", str(source), "--dst", str(destination), "--config", str(folder / "config.json")]) == 0
    assert_same({name: variable.numpy() for name, variable in named_variables(tfmaskformer.load(tmp_path / "back")).items()}, trained)


def test_it_goes_on_as_if_it_had_not_been_interrupted(task, data, garden, tmp_path):
    logged, _ = train(task, data, tmp_path / "run", train_steps=3)
    assert tf.train.latest_checkpoint(str(tmp_path / "run")) == str(tmp_path / "run" / "ckpt-3")
    more, _ = train(task, data, tmp_path / "run")
    assert [*logged, *more] == garden[1]
    assert_same(tensors(tmp_path / "run"), tensors(garden[0]))
    params = parameters(task, data)
    params.override({"task": {"model": {"options": [*params.task.model.options, "MODEL.SEM_SEG_HEAD.MASK_DIM", 24]}}})
    with pytest.raises(task.RunError, match="holds a training of another model"):
        task.MaskFormerTask(params.task, str(tmp_path / "run")).build_model()


def test_it_evaluates_as_tfmaskformer_eval(task, data, garden, tmp_path):
    found = train(task, data, garden[0], "eval")
    report = tmp_path / "report.json"
    assert evaluation_cli.main(["--ckpt", str(garden[0]), "--data", str(data), "--cpu", "--json", str(report)]) == 0
    metrics = json.loads(report.read_text())["metrics"]
    assert found["PQ"] == pytest.approx(metrics["panoptic"]["all"]["pq"], abs=1e-9)
    assert found["mIoU"] == pytest.approx(metrics["semantic"]["miou"], abs=1e-9)
    assert found["skipped_images"] == 0


def test_losses_and_what_it_begins_with(task, data, ours, tmp_path):
    params = parameters(task, data)
    options = [*params.task.model.options, "MODEL.MASK_FORMER.DROPOUT", 0.0, "MODEL.SWIN.DROP_PATH_RATE", 0.0]
    params.override({"task": {"init_checkpoint": str(ours), "model": {"options": options}}})
    made = task.MaskFormerTask(params.task, str(tmp_path / "run"))
    model = made.build_model()
    optimizer = made.create_optimizer(params.trainer.optimizer_config)
    made.initialize(model)
    expected = {name: variable.numpy() for name, variable in named_variables(tfmaskformer.load(ours)).items()}
    assert_same({name: variable.numpy() for name, variable in named_variables(model).items()}, expected)
    images, sizes, targets = task.step_arguments(next(iter(made.build_inputs(params.task.train_data))))
    losses, _ = task.TrainStep(model, optimizer, padding="masked").gradients(images, sizes, targets)
    outputs = model(images, sizes, training=True, padding="masked")
    assert float(made.build_losses(targets, outputs)) == float(losses["total_loss"])


def command(data, folder, *more, mode="train", name="maskformer_panoptic_R50_bs64_554k", **task_values):
    override = {"train_data": {"input_path": str(data)}, **task_values}
    return ["--experiment", name, "--mode", mode, "--model_dir", str(folder), "--params_override", str({"task": override}), *more]


def test_the_command(task, data, uncompiled, tmp_path, capsys):
    """Two steps, and a third by the parameters that it saved."""
    params = parameters(task, data, train_steps=2, validation_interval=2)
    values = written(params, tmp_path)
    for steps in (2, 3):
        more = ["--config_file", str(values), "--params_override", f"trainer.train_steps={steps}"]
        assert driver.main([*command(data, tmp_path / "run")[:6], *more]) == driver.OK
        assert tf.train.latest_checkpoint(str(tmp_path / "run")) == str(tmp_path / "run" / f"ckpt-{steps}")
        values = tmp_path / "run" / "params.yaml"
    assert "training_loss" in capsys.readouterr().out


def test_bad_input(task, data, tmp_path, capsys):
    out = tmp_path / "run"
    swin = {"model": {"config": "tiny_swin", "options": ["DATASETS.TRAIN", "('shapes_train',)", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7]}}
    for given, message in (
        ([*command(data, out)[:6], "--params_override", "runtime.mixed_precision_dtype=float16"], "dtype is 'mixed_float16'"),
        (command(data, out, name="maskformer_R5"), "maskformer_R5"),
        (command("nowhere", out, **swin), "nowhere"),
        (command("", out, **swin), "task.train_data.input_path is empty"),
        (command(data, out, mode="eval", **swin), "task.validation_data.input_path is empty"),
        (command(data, out, **swin, init_checkpoint="nowhere.pkl"), "--init: expected the weights of a backbone"),
        (command(data, out, **swin, init_checkpoint=str(data)), "no TensorFlow checkpoint in it"),
        (command(data, out, model={"options": ["SOLVER.BASE_LRR", 1]}), "unknown key 'SOLVER.BASE_LRR'; nearest: SOLVER.BASE_LR"),
        (command(data, out, model={"options": ["SEED", 1]}), "'SEED' is 'task.train_data.seed' here"),
        (command(data, out, **swin, max_iter=10), "inconsistency between key `trainer.train_steps"),
        (command(data, out, batch=1), "batch"),
        ([*command(data, out)[:6], "--params_override", "runtime.num_gpus=8"], "runtime.num_gpus is 8, and TensorFlow sees 0 GPUs"),
    ):
        code = driver.COULD_NOT_RUN if "GPUs" in message else driver.BAD_INPUT
        assert driver.main(given) == code, message
        told = capsys.readouterr()
        assert message in told.err, told.err
        assert not out.exists() or not list(out.iterdir())


def test_without_the_model_garden(monkeypatch, tmp_path, capsys):
    for package in ("official", "official.core"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "tfmaskformer.model_garden.task", raising=False)
    with pytest.raises(ImportError, match=r"pip install --no-deps 'tf-models-official==2\.20\.\*'"):
        importlib.import_module("tfmaskformer.model_garden.task")
    assert driver.main(command(tmp_path, tmp_path / "run")) == driver.COULD_NOT_RUN
    assert "error: the Model Garden is not there" in capsys.readouterr().err


def test_help_needs_no_tensorflow():
    code = "import sys; sys.modules['tensorflow'] = None\nfrom tfmaskformer.model_garden.__main__ import main\nmain(['--help'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "usage: python -m tfmaskformer.model_garden" in result.stdout
