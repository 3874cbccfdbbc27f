"""The official code: what is imported of it, and that a checkpoint which does not fit is refused."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from parity import official
from parity.official import OfficialError

CONFIG = "coco-panoptic/maskformer_panoptic_R50_bs64_554k"
needs_official = pytest.mark.skipif(
    not all(os.environ.get(variable) for variable in official.FOLDERS.values()),
    reason="no official code: MASKFORMER_SOURCE, DETECTRON2_SOURCE",
)


@pytest.fixture(scope="module")
def code():
    return official.load()


@pytest.fixture(scope="module")
def config(code):
    return code.config(CONFIG)


@pytest.fixture(scope="module")
def state(code, config):
    """The state of a random model as NumPy arrays, with version-1 keys, as a plain pickle holds them."""
    state = code.model(config, seed=1).state_dict()
    old = {key.replace("sem_seg_head.pixel_decoder.", "sem_seg_head."): tensor.numpy() for key, tensor in state.items()}
    assert set(old) != set(state)
    return old


def save(path, state):
    path.write_bytes(pickle.dumps({"model": state, "__author__": "test"}))
    return path


def test_folders_are_checked(tmp_path, monkeypatch):
    for variable in official.FOLDERS.values():
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(OfficialError, match="give its path as --maskformer or in MASKFORMER_SOURCE"):
        official.load()
    with pytest.raises(OfficialError, match=r"is no source folder of maskformer: it has no mask_former/__init__\.py"):
        official.load(tmp_path, tmp_path)


def test_importing_the_module_imports_no_torch():
    program = "import sys, parity.official; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.getcwd()}, timeout=60).returncode == 0


def test_the_guide_lists_every_stand_in():
    guide = (Path(__file__).parents[2] / "docs" / "recording.md").read_text()
    rows = [line.split("|")[1] for line in guide.splitlines() if line.startswith("| `")]
    assert re.findall(r"`(.+?)`", "".join(rows)) == list(official.STAND_INS)


@needs_official
def test_the_official_code_is_imported_and_identified(code):
    assert all(len(commit) == 40 or commit.startswith("unknown, tree sha256 ") for commit in code.commits.values())
    assert official.load() is code  # once in a process
    assert not any(isinstance(module, official._StandIn) for module in sys.modules.values())  # nobody else meets a stand-in


@needs_official
def test_a_stand_in_that_is_used_raises(code):
    from detectron2.layers.nms import nms

    if "torchvision.ops" in code.stand_ins:
        with pytest.raises(
            OfficialError, match=r"called torchvision\.ops\.nms, which is a stand-in \(see torchvision\); install torchvision"
        ):
            nms(None, None, 0.5)


@needs_official
def test_stand_ins_of_what_swin_calls_work(code):
    import torch
    from mask_former.modeling.backbone import swin

    if "timm.models.layers" not in code.stand_ins:
        pytest.skip("timm is installed")
    assert (swin.to_2tuple(3), swin.to_2tuple((3, 4))) == ((3, 3), (3, 4))
    drop = swin.DropPath(0.25)
    images = torch.ones(4000, 2, 3)
    assert torch.equal(drop.eval()(images), images)
    torch.manual_seed(0)
    dropped = drop.train()(images)
    assert set(dropped.flatten().tolist()) == {0.0, float(torch.tensor(1) / 0.75)}
    assert torch.equal(dropped.amin((1, 2)), dropped.amax((1, 2)))
    assert 0.72 < (dropped[:, 0, 0] > 0).double().mean() < 0.78


@needs_official
def test_configs_are_found_by_name_and_unknown_ones_refused(code, config):
    assert config.MODEL.MASK_FORMER.SIZE_DIVISIBILITY == 0
    assert code.config(code.maskformer / "configs" / f"{CONFIG}.yaml").dump() == config.dump()
    with pytest.raises(OfficialError, match=rf"no official config 'x'; known: .*{CONFIG}\.yaml"):
        code.config("x")
    metadata = code.metadata(config)
    assert (metadata["dataset"], metadata["thing_classes"], len(metadata["class_names"])) == (
        "coco_2017_train_panoptic",
        list(range(80)),
        133,
    )


@needs_official
def test_state_layout(code):
    layout = code.state_layout(CONFIG)
    entries = {entry.key: entry for entry in layout}
    assert len(layout) == len(entries) == 482
    assert entries["sem_seg_head.predictor.query_embed.weight"] == (
        "sem_seg_head.predictor.query_embed.weight",
        (100, 256),
        "float32",
        "parameter",
    )
    assert entries["backbone.res2.0.conv1.norm.running_var"].kind == "buffer"
    assert entries["criterion.empty_weight"].shape == (134,)


@needs_official
def test_a_version_1_pickle_loads_whole(code, config, state, tmp_path):
    model = code.model(config, save(tmp_path / "model.pkl", state), seed=2)
    loaded = {key.replace("sem_seg_head.pixel_decoder.", "sem_seg_head."): tensor.numpy() for key, tensor in model.state_dict().items()}
    assert set(loaded) == set(state)
    for key, tensor in loaded.items():
        np.testing.assert_array_equal(tensor, state[key])
    assert not model.training


@needs_official
def test_float64_is_the_cast_float32_model(code, config):
    import torch

    double = code.model(config, dtype="float64", training=True, channels_last=True)
    single = code.model(config)
    assert double.training
    assert double.pixel_mean.dtype == torch.float64
    assert double.pixel_mean[0].item() == float(np.float32(123.675))
    assert double.backbone.stem.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    for key, tensor in single.state_dict().items():
        assert torch.equal(double.state_dict()[key], tensor.double())


@needs_official
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("backbone.stem.conv1.weight"), "1 missing: backbone.stem.conv1.weight"),
        (lambda state: state.update(extra=np.zeros(1)), "1 unexpected: extra"),
        (lambda state: state.update({"backbone.stem.conv1.weight": np.zeros(3, np.float32)}), "1 misshapen: .*stem.conv1.weight"),
        (lambda state: state.update({"sem_seg_head.mask_features.bias": np.zeros(3, np.float32)}), "(?s)cannot load .*size mismatch"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(code, config, state, tmp_path, change, message):
    broken = dict(state)
    change(broken)
    with pytest.raises(OfficialError, match=message):
        code.model(config, save(tmp_path / "model.pkl", broken))


@needs_official
def test_absent_and_truncated_checkpoints_are_refused(code, config, tmp_path):
    with pytest.raises(OfficialError, match="no checkpoint"):
        code.model(config, tmp_path / "absent.pkl")
    for name, content in [("empty.pkl", b""), ("cut.pkl", pickle.dumps({"model": {"a": np.zeros(9)}})[:50]), ("empty.pth", b"")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OfficialError, match=f"the official loader cannot load .*{name}"):
            code.model(config, tmp_path / name)


class _Malicious:
    def __reduce__(self):
        return os.mkdir, ("made_by_pickle",)


@needs_official
def test_a_pickle_that_runs_code_is_refused(code, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": _Malicious(), "__author__": "x"}))
    with pytest.raises(OfficialError, match="cannot load"):
        code.model(config, tmp_path / "model.pkl")
    assert not (tmp_path / "made_by_pickle").exists()
