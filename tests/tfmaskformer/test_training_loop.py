"""``tfmaskformer train``: what is in its folder, resuming bit for bit, replicas, parts, kills, the guard, overrides and bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import yaml

import tfmaskformer
from checkpoints import registry
from converters import cli as convert
from tests.tfmaskformer import training_processes
from tests.tfmaskformer.training_processes import arguments
from tfmaskformer.checkpoint import read_config
from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.data import shapes
from tfmaskformer.evaluation import cli as evaluation_cli
from tfmaskformer.evaluation import evaluate
from tfmaskformer.module import named_variables
from tfmaskformer.official_config import config_of, named_tree
from tfmaskformer.official_yaml import dump, override, read_tree
from tfmaskformer.training import cli, loop
from tfmaskformer.training.guard import DivergedError, Guard, Observed, not_finite
from tfmaskformer.training.step import StepResult
from tfmaskformer.training.summaries import Summaries

LOSSES = [f"loss_{term}{layer}" for term in ("ce", "mask", "dice") for layer in ("", "_0")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write(folder, "train", 10)
    shapes.write(folder, "val", 2)
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory, uncompiled):
    """Four steps, and an evaluation, though TEST.EVAL_PERIOD is 0: upstream evaluates after the last step all the same."""
    out = tmp_path_factory.mktemp("run") / "whole"
    assert cli.main(arguments(data, out, SOLVER__MAX_ITER=4)) == cli.OK
    return out


def variables(folder):
    """All tensors of a folder's last checkpoint."""
    reader = tf.train.load_checkpoint(str(folder))
    keys = reader.get_variable_to_shape_map()
    return {key: reader.get_tensor(key) for key in keys if not key.startswith(("_", "save_counter"))}


def assert_same(folder, other):
    found, expected = variables(folder), variables(other)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)


def curves(folder):
    """Tag → step → value, or the picture's bytes; of files that may end in the middle of a record."""
    found: dict[str, dict[int, object]] = {}
    for file in sorted((Path(folder) / "events").iterdir()):
        with contextlib.suppress(tf.errors.DataLossError):
            for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
                event = tf.compat.v1.Event.FromString(record)
                for value in event.summary.value:
                    found.setdefault(value.tag, {})[event.step] = value.image.encoded_image_string or value.simple_value
    return found


def test_compiled_on_one_device(data, tmp_path, monkeypatch):
    """With XLA, in bfloat16, in parts, computing blocks again. Before the tests that replace ``tf.function``."""
    assert tf.function.__module__.startswith("tensorflow.")
    function, compiled = tf.function, []

    def seen(python_function=None, **options):
        compiled.extend([python_function.__name__] if options.get("jit_compile") else [])
        return function(python_function, **options)

    monkeypatch.setattr(tf, "function", seen)
    more = ["--bfloat16", "--accumulate", "2", "--rematerialise"]
    assert cli.main(arguments(data, tmp_path / "run", *more, SOLVER__MAX_ITER=2, DATASETS__TEST="()", **training_processes.QUICK)) == cli.OK
    assert compiled == ["on_replica"]  # the whole step
    assert not list((tmp_path / "run").glob("evaluation-*"))  # DATASETS.TEST is empty
    plan = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (plan["dtype"], plan["parts"], plan["rematerialise"]) == ("mixed_bfloat16", 2, True)
    assert all(value.dtype in (np.float32, np.float64, np.int64) for value in variables(tmp_path / "run").values())
    assert 3 < curves(tmp_path / "run")["total_loss"][2] < 10


def test_what_a_training_leaves(whole, data, tmp_path, capsys):
    tree = named_tree("tiny_swin")[1]
    options = training_processes.OPTIONS | {"SOLVER.MAX_ITER": 4}
    override(tree, [part for option in options.items() for part in option])
    assert read_tree(whole / "config.yaml") == tree
    assert read_config(whole) == config_of(tree, "tiny_swin")
    assert sorted(file.name for file in whole.glob("ckpt-*.index")) == ["ckpt-2.index", "ckpt-4.index"]

    found = curves(whole)
    assert {*LOSSES, "total_loss", "lr", "gradient_norm", "images_per_second", "data_seconds", "dropped_objects"} <= found.keys()
    assert sorted(found["loss_mask_0"]) == [1, 2, 3, 4]
    for step in range(1, 5):
        assert found["total_loss"][step] == pytest.approx(sum(found[key][step] for key in LOSSES), rel=1e-5)
    assert sorted(found["sample"]) == [2, 4]
    assert tf.io.decode_png(found["sample"][4]).shape[1] > 2 * 64  # ground truth and prediction beside each other

    # The folder is a checkpoint directory, and its evaluation that of the command.
    report = json.loads((whole / "evaluation-4.json").read_text())
    assert evaluation_cli.main(["--ckpt", str(whole), "--data", str(data), "--cpu", "--json", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert (again["metrics"], again["counts"]) == (report["metrics"], report["counts"])
    assert found["evaluation/PQ"][4] == pytest.approx(report["metrics"]["panoptic"]["all"]["pq"])
    assert found["evaluation/mIoU"][4] == pytest.approx(report["metrics"]["semantic"]["miou"])

    # The official layout, and back: the same weights.
    for source, destination in ((whole, tmp_path / "model.pkl"), (tmp_path / "model.pkl", tmp_path / "back")):
        assert convert.main(["--src", str(source), "--dst", str(destination), "--config", str(whole / "config.json")]) == 0
    trained, back = (named_variables(tfmaskformer.load(folder)) for folder in (whole, tmp_path / "back"))
    assert trained.keys() == back.keys()
    for name, variable in trained.items():
        np.testing.assert_array_equal(back[name].numpy(), variable.numpy(), err_msg=name)

    before = {file.name: file.stat().st_mtime_ns for file in whole.iterdir()}
    assert cli.main(arguments(data, whole, SOLVER__MAX_ITER=4)) == cli.OK  # there is nothing left to do
    assert {file.name: file.stat().st_mtime_ns for file in whole.iterdir() if file.name != "events"} == {
        name: time for name, time in before.items() if name != "events"
    }


def test_a_training_ended_by_a_full_disk_goes_on(whole, data, tmp_path, monkeypatch, capsys):
    """When it saves step 4; the checkpoint of step 2 stays. Then when it evaluates: that is made up for.

    The result is the same, bit for bit, optimizer and all. With dropout.
    """
    save, (soft, hard) = tf.train.CheckpointManager.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_full_disk(self, checkpoint_number):
        if checkpoint_number == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        return save(self, checkpoint_number)

    command = arguments(data, tmp_path / "run", SOLVER__MAX_ITER=4)
    with monkeypatch.context() as patch:
        patch.setattr(tf.train.CheckpointManager, "save", save_on_full_disk)
        try:
            assert cli.main(command) == cli.COULD_NOT_RUN
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the same command goes on from the last checkpoint" in capsys.readouterr().err
    assert tf.train.latest_checkpoint(str(tmp_path / "run")) == str(tmp_path / "run" / "ckpt-2")
    with monkeypatch.context() as patch:

        def interrupted(*arguments, **options):
            raise OSError("no space left")

        patch.setattr(loop, "Evaluation", interrupted)
        assert cli.main(command) == cli.COULD_NOT_RUN
    assert "step 3 of 4" in capsys.readouterr().err
    assert cli.main(command) == cli.OK
    assert "step 4 of 4" not in capsys.readouterr().err
    report, expected = (json.loads((folder / "evaluation-4.json").read_text()) for folder in (tmp_path / "run", whole))
    assert (report["metrics"], report["counts"]) == (expected["metrics"], expected["counts"])
    assert_same(tmp_path / "run", whole)
    assert len(variables(whole)) > 300
    losses = variables(whole)["guard/recent/.ATTRIBUTES/VARIABLE_VALUE"]
    assert np.isnan(losses[:16]).all()
    assert ((losses[16:] > 5) & (losses[16:] < 20)).all()
    found, expected = curves(tmp_path / "run"), curves(whole)
    for tag in (*LOSSES, "gradient_norm", "lr", "sample", "evaluation/PQ"):
        assert found[tag] == expected[tag], tag


def test_a_damaged_folder(whole, data, tmp_path, uncompiled, capsys):
    """Where no file tells the last checkpoint, it is looked for; one that is damaged is told, and which other there is."""
    command = arguments(data, tmp_path / "run", SOLVER__MAX_ITER=4)
    shutil.copytree(whole, tmp_path / "run")
    for name, bads in (
        ("checkpoint", (None, b"")),
        ("config.yaml", (None, b"", b"\xff{", b"MODEL: {")),
        ("run.json", (None, b"", b"\xff{", b'{"format": ')),
        ("ckpt-4.data-00000-of-00001", (b"\x00" * 1000,)),
    ):
        file = tmp_path / "run" / name
        good = file.read_bytes()
        for bad in bads:
            file.unlink(missing_ok=True)
            if bad is not None:
                file.write_bytes(bad)
            code = cli.main(command)
            told = capsys.readouterr()
            if name == "checkpoint":
                assert (code, "step " in told.err) == (cli.OK, False)
                assert tf.train.latest_checkpoint(str(tmp_path / "run")) == str(tmp_path / "run" / "ckpt-4")
            elif name == "run.json" and bad is None:
                assert code == cli.BAD_INPUT
                assert "is not empty, and holds no training" in told.err
            else:
                assert code == cli.BAD_INPUT, (name, bad)
                where = str(tmp_path / "run" / name.partition(".data")[0])
                assert f"error: '{where}' " in told.err or "holds another training" in told.err
        file.write_bytes(good)
    assert "remove its files (ckpt-4.*) to go on from" in told.err
    file = tmp_path / "run" / "run.json"
    good = file.read_text()
    file.write_text(good.replace('"images_sha256": "', '"images_sha256": "0'))  # as many images, and others
    assert cli.main(command) == cli.BAD_INPUT
    assert "holds another training:\n  images_sha256: " in capsys.readouterr().err
    file.write_text(good)
    for file in (tmp_path / "run").glob("ckpt-4.*"):
        file.unlink()
    assert cli.main(command) == cli.OK
    assert "step 4 of 4" in capsys.readouterr().err
    assert_same(tmp_path / "run", whole)


def test_what_is_asked_for_reaches_model_step_and_data(data, tmp_path, uncompiled, monkeypatch):
    made, asked, dataset = [], [], loop.training_dataset
    monkeypatch.setattr(loop.Training, "run", lambda self, *rest: made.append(self))
    monkeypatch.setattr(loop, "training_dataset", lambda *given, **options: asked.append(options) or dataset(*given, **options))
    more = ["--bfloat16", "--accumulate", "2", "--rematerialise", "--canvas", "96", "128", "--max-objects", "7"]
    for number, (seed, options) in enumerate(((5, more), (5, []), (6, []))):
        assert cli.main(arguments(data, tmp_path / str(number), *options, SEED=seed)) == cli.OK
    _, second, third = made
    assert asked[0] == {"seed": 5, "batch": 4, "max_objects": 7, "canvas": (96, 128), "start": 0, "shard": (0, 1)}
    assert asked[1] == {"seed": 5, "batch": 4, "max_objects": 10, "canvas": None, "start": 0, "shard": (0, 1)}
    steps = [training._step for training in made]
    assert [(step.seed, step.parts, step.rematerialise) for step in steps] == [(5, 2, True), (5, 1, False), (6, 1, False)]
    assert {step.padding for step in steps} == {"masked"}
    assert [training.model.compute_dtype for training in made] == ["bfloat16", "float32", "float32"]
    start = [named_variables(training.model)["sem_seg_head.predictor.class_embed.weight"].numpy() for training in made]
    assert np.array_equal(start[0], start[1])
    assert not np.array_equal(start[1], start[2])

    # Twenty steps at a time: means, the last rate, all objects that were left out; and names of what is not finite.
    names = [parameter.name for parameter in second.optimizer.parameters]

    def timed(step, **values):
        finite = [name not in values.get("bad", ()) for name in names]
        losses = {"loss_ce": tf.constant(values["loss"]), "total_loss": tf.constant(values["loss"])}
        result = StepResult(losses, tf.constant(finite), tf.constant(values["loss"] / 2), tf.constant(0.1 * step, tf.float64))
        return loop._Timed(step, result, tf.constant([step, 2]), float(step))

    values = second._observe([timed(1, loss=4.0), timed(2, loss=8.0)], None)
    assert values == {
        "loss_ce": 6.0, "total_loss": 6.0, "gradient_norm": 3.0, "lr": 0.2, "data_seconds": 1.5, "dropped_objects": 7.0
    }  # fmt: skip
    with pytest.raises(
        DivergedError, match=f"step 4: all losses are finite, but the gradient of {names[7]} is not\n  there is no checkpoint"
    ):
        second._observe([timed(3, loss=4.0), timed(4, loss=8.0, bad=[names[7]])], None)
    second.guard.lowest.assign(6.0)
    with pytest.raises(DivergedError, match=r"step 4: the loss diverged.*\n  'run/ckpt-3' is the last good checkpoint"):
        second._observe([timed(4, loss=61.0)] * 20, "run/ckpt-3")
    with monkeypatch.context() as patch:
        fine = timed(5, loss=4.0).result
        patch.setattr(second, "_local", lambda result: [fine, result])  # of two replicas
        with pytest.raises(DivergedError, match=f"step 5: all losses are finite, but the gradient of {names[7]} is not"):
            second._observe([timed(5, loss=4.0, bad=[names[7]])], None)
    second._check_weights(1, None)
    variable = named_variables(third.model)["sem_seg_head.predictor.class_embed.weight"]
    third._check_weights(1, None)
    variable.assign(variable.numpy() * np.inf)
    with pytest.raises(
        DivergedError,
        match=r"step 9: the weight sem_seg_head\.predictor\.class_embed\.weight is not finite\n  the last good checkpoint: run/ckpt-8",
    ):
        third._check_weights(9, "run/ckpt-8")


def processes(*command):
    script = Path(__file__).with_name("training_processes.py")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, str(script), *map(str, command)], capture_output=True, text=True, timeout=3000, check=False, env=environment
    )
    logs = "".join(file.read_text() for file in Path(command[2]).glob("*.log"))
    assert result.returncode == 0, (result.stderr + logs)[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_replicas_and_processes(data, tmp_path):
    """Two processes are two replicas of one, dropout included; step_replicas.py has what a replica is."""
    apart = processes("replicas", data, tmp_path)["apart"]
    two, workers = curves(tmp_path / "two"), curves(tmp_path / "workers")
    for tag in (*LOSSES, "gradient_norm", "lr"):
        for step, rel in ((1, 1e-5), (2, 1e-3)):
            assert two[tag][step] == pytest.approx(workers[tag][step], rel=rel), (tag, step)
    found, expected = variables(tmp_path / "two"), variables(tmp_path / "workers")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-2, atol=1e-4, err_msg=key)
    assert json.loads((tmp_path / "workers" / "evaluation-2.json").read_text())["images"]["evaluated"] == 2  # one each

    # Where they were not told the same, none begins. They heed SIGTERM.
    assert apart == [-signal.SIGTERM] * 2
    for seed in range(2):
        told = (tmp_path / f"apart{seed}.log").read_text()
        assert "error: worker 1 is to do something else:\n  config.yaml.SEED: 1, worker 0 0\n  run.json.seed: 1, worker 0 0" in told
        assert told.endswith(f"code {cli.BAD_INPUT}\n")
    assert not (tmp_path / "apart").exists()


def test_a_cluster_of_other_jobs_than_workers(data, tmp_path, monkeypatch, capsys):
    """TensorFlow knows a chief, too; taken for one machine, each would write the same folder."""
    monkeypatch.setenv("TF_CONFIG", '{"cluster": {"chief": ["a:1"], "worker": ["b:1"]}, "task": {"type": "worker", "index": 0}}')
    assert cli.main(arguments(data, tmp_path / "run")) == cli.COULD_NOT_RUN
    assert "TF_CONFIG lists jobs chief, worker, expected all machines under 'worker'" in capsys.readouterr().err


def test_another_worker_that_ends(data, tmp_path, uncompiled, monkeypatch, capsys):
    """As TensorFlow 2.21 tells it."""
    lost = "{{function_node f}} Collective ops is aborted by: recvmsg:Connection reset by peer\nAdditional GRPC error information\n [[Op]]"

    def run(*given):
        raise tf.errors.UnavailableError(None, None, lost)

    monkeypatch.setattr(loop.Training, "run", run)
    assert cli.main(arguments(data, tmp_path / "run", **training_processes.QUICKEST)) == cli.COULD_NOT_RUN
    told = "error: another worker ended, or cannot be reached: recvmsg:Connection reset by peer\n  the same command goes on from the last"
    assert told in capsys.readouterr().err


def test_evaluations_of_a_training(data, tmp_path, uncompiled, monkeypatch):
    """They are traced once, and each is what ``tfmaskformer eval`` finds: of the last checkpoint, in float32."""
    made = []
    monkeypatch.setattr(loop.Training, "run", lambda self, run, *rest: made.append((self, run)))
    assert cli.main(arguments(data, tmp_path / "run", "--bfloat16", **training_processes.QUICKEST)) == cli.OK
    [(training, run)] = made
    run.begin()
    manager, reports, traced, infer_step = run.restore(model=training.model), [], [], evaluate.infer_step
    monkeypatch.setattr(evaluate, "infer_step", lambda *given: traced.append(given) or infer_step(*given))
    for step in (1, 2):
        for variable in named_variables(training.model).values():
            variable.assign(variable * 1.25)
        manager.save(checkpoint_number=step)
        training._evaluate(run, Summaries(None), step)
        reports.append(json.loads((tmp_path / "run" / f"evaluation-{step}.json").read_text()))
    assert len(traced) == 1
    assert reports[0]["counts"] != reports[1]["counts"]
    assert evaluation_cli.main(["--ckpt", run.folder, "--data", str(data), "--cpu", "--json", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    for key in ("metrics", "counts", "checkpoint", "images"):
        assert reports[1][key] == again[key], key


def test_a_training_killed_at_random_moments(data, tmp_path):
    """``make kills`` has 50 of them."""
    kills = int(os.environ.get("TFMASKFORMER_KILLS", "3"))
    left = processes("kills", data, tmp_path, kills)["left"]
    assert len(left) == kills
    for kill in left:
        assert max(0, (kill["told"] - 1) // 2 * 2) <= kill["checkpoint"], left
    for what in ("saving", "evaluating"):
        assert sum(kill[what] for kill in left) >= kills // 6, left
    whole, completed = tmp_path / "whole", list(tmp_path.glob("completed-*"))
    assert sorted(file.stem for file in whole.glob("ckpt-*.index")) == ["ckpt-4", "ckpt-6", "ckpt-8"]  # the last three
    for folder in (tmp_path / "killed", *completed):
        assert_same(folder, whole)
        assert {file.name for file in whole.glob("ckpt-*")} <= {file.name for file in folder.glob("ckpt-*")}
        for step in (4, 8):
            report, expected = (json.loads((each / f"evaluation-{step}.json").read_text()) for each in (folder, whole))
            assert (report["metrics"], report["counts"]) == (expected["metrics"], expected["counts"])
        found, expected = curves(folder), curves(whole)
        assert found.keys() == expected.keys()
        for tag in expected.keys() - {"images_per_second", "data_seconds"}:
            assert found[tag] == expected[tag], (folder, tag)


def observed(step=1, bad=(), norm=1.0, **losses):
    losses = dict.fromkeys(LOSSES, 1.0) | losses
    return Observed(step, losses | {"total_loss": sum(losses.values())}, list(bad), norm)


def test_what_is_not_finite_first():
    assert not_finite(observed()) == ""
    assert not_finite(observed(loss_mask=float("inf"))) == "loss_mask is inf"
    nan = float("nan")
    assert not_finite(observed(loss_ce=nan, loss_ce_0=nan, loss_dice_0=nan)) == "loss_ce_0 is nan, then loss_dice_0, loss_ce"
    names = ["backbone.a", "backbone.b", "sem_seg_head.c"]
    told = "all losses are finite, but the gradient of sem_seg_head.c is not, then those of backbone.b, backbone.a"
    assert not_finite(observed(bad=names)) == told
    assert not_finite(observed(norm=float("inf"))).startswith("total_loss is 6.0, the gradient's norm inf")


def test_the_guard_ends_a_training_that_diverges():
    guard = Guard()

    def check(*losses, first=0):
        guard.check([observed(first + step, loss_mask=loss) for step, loss in enumerate(losses)])  # and 5 of others

    check(*[10.0] * 15)
    check(0.001, first=15)  # a short window, as before an evaluation, is not judged by itself
    assert guard.lowest.numpy() == np.inf
    check(*[10.0] * 10, first=16)
    assert guard.lowest.numpy() == 15
    check(*[4.0] * 20)
    check(*[30.0] * 20)  # not ten times the lowest
    assert guard.lowest.numpy() == 9
    check(*[1e9] * 9)  # nine wild steps are none
    with pytest.raises(DivergedError, match=r"step 60: the loss diverged: the median of the last 20 steps is 105, and it was 9"):
        check(*[100.0] * 11, first=50)
    with pytest.raises(DivergedError, match=r"step 7: loss_dice is nan$"):
        guard.check([observed(6), observed(7, loss_dice=float("nan")), observed(8, loss_ce_0=float("nan"))])


def test_a_training_that_goes_wrong(whole, data, tmp_path, uncompiled, capsys):
    """It starts from another, stops, says in which step and with which term, and leaves the last good checkpoint."""
    options = {"SOLVER__MAX_ITER": 6, "SOLVER__CHECKPOINT_PERIOD": 1, "SOLVER__WARMUP_ITERS": 4, "SOLVER__WARMUP_FACTOR": 1e-39}
    assert cli.main(arguments(data, tmp_path / "run", "--init", str(whole), **options, SOLVER__BASE_LR=1e30)) == cli.DIVERGED
    err = capsys.readouterr().err
    assert "error: step 3: loss_ce_0 is nan, then loss_dice_0, loss_mask_0, loss_ce and 2 more" in err
    assert f"'{tmp_path / 'run' / 'ckpt-2'}' is the last good checkpoint" in err
    assert all(np.isfinite(value).all() for key, value in variables(tmp_path / "run").items() if not key.startswith("guard/"))
    reader, start = tf.train.load_checkpoint(str(tmp_path / "run" / "ckpt-1")), variables(whole)
    for key, value in start.items():
        if key.startswith("model/"):  # the rate of the first step was 1e-9
            np.testing.assert_allclose(reader.get_tensor(key), value, atol=1e-7, err_msg=key)


def test_bad_input(data, whole, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("")
    good = {"SOLVER__MAX_ITER": 4}
    for changes, options, message in (
        ({"--config": "maskformer_R5"}, {}, "no zoo entry 'maskformer_R5'"),
        ({"--config": "nowhere.yaml"}, {}, "'nowhere.yaml' does not exist"),
        ({"--data": "nowhere"}, {}, "nowhere"),
        ({"--init": "nowhere.pkl"}, {}, "--init: expected the weights of a backbone"),
        ({"--out": str(tmp_path / "file" / "run")}, {}, "choose another --out"),
        ({"--out": str(tmp_path / "full")}, {}, "is not empty, and holds no training"),
        ({"--out": str(whole)}, good | {"SOLVER__BASE_LR": 0.5}, "SOLVER.BASE_LR: 0.5, there 0.001"),
        ({"--out": str(whole), "--accumulate": "2"}, good, "parts: 2, there 1"),
        ({"--accumulate": "3"}, {}, "SOLVER.IMS_PER_BATCH is 4, expected a multiple of 3"),
        ({}, {"SOLVER__BASE_LRR": 1.0}, "unknown key 'SOLVER.BASE_LRR'; nearest: SOLVER.BASE_LR"),
        ({}, {"SOLVER__BASE_LR": "fast"}, "'SOLVER.BASE_LR' is 'fast', expected float"),
        ({}, {"SOLVER__AMP__ENABLED": True}, "'SOLVER.AMP.ENABLED' is True, supported: False"),
        ({}, {"DATASETS__TRAIN": "('mine',)"}, "is no data set known here"),
        ({}, {"MODEL__SEM_SEG_HEAD__NUM_CLASSES": 8}, "which has 7 classes"),
    ):
        out = tmp_path / "run"
        command = arguments(data, out, **options)
        for option, value in changes.items():
            command = [option, value, *command] if option not in command else command
            command[command.index(option) + 1] = value
        assert cli.main(command) == cli.BAD_INPUT, message
        told = capsys.readouterr()
        assert told.out == ""
        assert message in told.err
        assert not out.exists()
    with pytest.raises(SystemExit):
        cli.main([*arguments(data, tmp_path / "run"), "--replicas", "2", "--gpu"])
    assert cli.main([*arguments(data, tmp_path / "run"), "SOLVER.MAX_ITER"]) == cli.BAD_INPUT
    assert "'SOLVER.MAX_ITER' has no value" in capsys.readouterr().err


def test_what_it_does_not_start_from(whole, data, tmp_path, uncompiled, capsys):
    """NaN, or another model."""
    spoilt = tmp_path / "spoilt"
    shutil.copytree(whole, spoilt)
    model = tfmaskformer.load(spoilt)
    name, variable = list(named_variables(model).items())[5]
    variable.assign(variable.numpy() * np.nan)
    tf.train.Checkpoint(model=model).save(str(spoilt / "ckpt"))
    assert cli.main(arguments(data, tmp_path / "other", "--init", str(spoilt))) == cli.BAD_INPUT
    assert f"the weight {name} is not finite" in capsys.readouterr().err
    assert cli.main(arguments(data, tmp_path / "other", "--init", str(whole), MODEL__SEM_SEG_HEAD__MASK_DIM=24)) == cli.BAD_INPUT
    assert "has shape" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_it_starts_from_a_model_of_other_classes(whole, data, tmp_path, uncompiled, capsys):
    other = tfmaskformer.MaskFormer(dataclasses.replace(read_config(whole), num_classes=9, class_names=(), thing_classes=()))
    other.build_parameters()
    tf.train.CheckpointManager(tf.train.Checkpoint(model=other), str(tmp_path / "other"), 1).save()
    (tmp_path / "other" / "config.json").write_text(json.dumps(other.config.to_dict()))
    options = {"SOLVER__MAX_ITER": 1, "SOLVER__BASE_LR": 1e-12}
    assert cli.main(arguments(data, tmp_path / "run", "--init", str(tmp_path / "other"), **options)) == cli.OK
    told = capsys.readouterr().err
    layer = "sem_seg_head.predictor.class_embed."
    assert f"note: {layer}weight, {layer}bias: drawn, since" in told
    assert "has other classes than the 7 that are trained" in told
    begun, trained = named_variables(other), named_variables(tfmaskformer.load(tmp_path / "run"))
    for name, variable in trained.items():
        if name.startswith(layer):
            assert variable.shape[-1] == 8
        else:
            np.testing.assert_allclose(variable.numpy(), begun[name].numpy(), atol=1e-9, err_msg=name)


def test_every_official_config_by_name(tmp_path):
    """Model and YAML."""
    for entry in registry.entries():
        name, tree = named_tree(entry.name)
        assert config_of(tree, name) == MaskFormerConfig.from_dict(entry.config)
        (tmp_path / "config.yaml").write_text(dump(tree))
        assert read_tree(tmp_path / "config.yaml") == tree
        assert yaml.safe_load(dump(tree)).keys() == tree.keys()


def test_help_needs_no_tensorflow():
    code = "import sys; sys.modules['tensorflow'] = None\nfrom tfmaskformer.training.cli import main\nmain(sys.argv[1:])"
    result = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "usage: tfmaskformer train" in result.stdout
