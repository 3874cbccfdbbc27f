"""What the workers of a measurement see of the machine."""

import sys

import pytest

from bench import common, gpu


@pytest.mark.parametrize(("asked_for", "expected"), [(False, "-1"), (True, "0")])
def test_only_who_is_to_use_a_gpu_sees_one(asked_for, expected, tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(
        "import os\n\nfrom bench import common\n\nif __name__ == '__main__':\n"
        "    common.serve(lambda: open('seen', 'a').write(os.environ['CUDA_VISIBLE_DEVICES'] + ' '))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{common.__file__.removesuffix('/bench/common.py')}")
    seconds, peaks = common.in_turns("worker", ["one"], warm_ups=1, passes=2, gpu=asked_for)
    assert len(seconds["one"]) == 2
    assert peaks["one"] > 1e6
    assert (tmp_path / "seen").read_text().split() == [expected] * 3


def test_nothing_is_measured_where_there_is_no_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.main() == 0
    assert capsys.readouterr().out == ""


def test_a_gpu_is_measured(tmp_path, monkeypatch, capsys):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nprint('NVIDIA H200\\nNVIDIA H200')\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("MASKFORMER_SOURCE", raising=False)
    asked = []

    def in_turns(module, names, *arguments, gpu, **passes):
        asked.append((module, *arguments, gpu))
        return {name: [0.5, 0.25, 0.75] for name in names}, dict.fromkeys(names, 10**9)

    monkeypatch.setattr("bench.train.in_turns", in_turns)
    assert gpu.main() == 0
    assert asked == [("bench.train", "1", "gpu", True), ("bench.train", "8", "gpu", True)]
    out = capsys.readouterr().out
    assert "on NVIDIA H200: maskformer_panoptic_R50" in out
    assert "| TensorFlow, XLA, batch 8 | 0.500 s | 0.250 s | – |" in out
