"""Checkpoints at their true widths: Swin, and the per-pixel baseline with queries; R50 with the encoder is the README's example, which is
run as well, and R101c's stem and dilations are checked at small widths (``test_backbones``).

``make zoo`` proves them all, with both paddings.
"""

import math
from pathlib import Path

import pytest

from checkpoints import registry
from parity import judge, prove
from parity.trace import Trace


@pytest.mark.parametrize(
    ("name", "padding", "assigns"),
    [
        ("maskformer_panoptic_swin_tiny_bs64_554k", "masked", True),
        ("per_pixel_baseline_plus_R50_bs16_160k", "official", False),
    ],
)
def test_checkpoint_matches_the_official_code(name, padding, assigns):
    proof = prove.prove(registry.entry(name), [padding])
    assert [(check.settings.padding, check.settings.dtypes, len(check.cases)) for check in proof.checks] == [
        (padding, (dtype,), 2) for dtype in ("float32", "float64")
    ]
    sizes = {size for check in proof.checks for case in check.cases for size in case.sizes_px}
    assert any(height % 2 and width % 2 for height, width in sizes)
    assert bool(prove.summary(proof)["assignments"][1]) == assigns
    assert proof.passed, prove.table([prove.summary(proof)])
    # Nothing was skipped, and what passed did not pass because nothing was asked of it.
    for check in proof.checks:
        for case in check.cases:
            judged = [item for item in case.items if item.group in ("taps", "outputs", "losses")]
            assert len(judged) > 200
            assert all(math.isfinite(item.tolerance) and item.tolerance < 1e-3 for item in judged)


def test_assignments_of_all_traces_are_clear():
    for folder in prove.TRACES.iterdir():
        trace = Trace(folder)
        assert trace.provenance["seed"] == prove.SEEDS.get(folder.name, 0)
        for name in trace.cases:
            with trace.case(name) as case:
                places = [key.removesuffix("/gap") for key in case.reference.group("matcher") if key.endswith("/gap")]
                assert bool(places) == (not folder.name.startswith("per_pixel"))
                for place in places:
                    gap, noise = judge.gap_and_noise(case, place)
                    assert gap >= prove.CLEAR * noise, (folder.name, name, place)


def test_readme_has_the_table_of_the_last_runs():
    root = Path(__file__).parents[2]
    results = prove.read_results(root / "docs" / "zoo.json")
    assert results
    assert list(results) == [entry.name for entry in registry.entries()]
    assert all(row["passed"] and row["back"] for row in results.values())
    assert f"{prove.MARKS[0]}\n{prove.table(list(results.values()))}\n{prove.MARKS[1]}" in (root / "README.md").read_text(encoding="utf-8")


def test_a_new_row_takes_its_place_in_the_file_and_on_the_page(tmp_path):
    root, results, page = Path(__file__).parents[2], tmp_path / "zoo.json", tmp_path / "page.md"
    rows = prove.read_results(root / "docs" / "zoo.json")
    first, *_, last = rows
    page.write_text(f"before\n{prove.MARKS[0]}\nold\n{prove.MARKS[1]}\nafter\n")
    for names in ([last], [last, first]):
        prove.write_results(results, {name: rows[name] for name in names})
        prove.write_table(page, results)
    assert list(prove.read_results(results)) == [first, last]  # the order of the model zoo
    text = page.read_text()
    assert text.startswith(f"before\n{prove.MARKS[0]}\n| entry")
    assert text.endswith(f"\n{prove.MARKS[1]}\nafter\n")
    assert "old" not in text
    assert text.index(f"| {first} |") < text.index(f"| {last} |")


def test_a_page_without_an_end_is_refused_before_anything_is_proven(tmp_path, capsys, monkeypatch):
    page, text = tmp_path / "page.md", f"before\n{prove.MARKS[0]}\nold\nbehind\n"
    page.write_text(text)
    with pytest.raises(ValueError, match="between which the table goes"):
        prove.write_table(page, tmp_path / "zoo.json")
    monkeypatch.setattr(prove, "prove", None)
    assert prove.main(["--results", str(tmp_path / "zoo.json"), "--page", str(page)]) == 2
    assert "between which the table goes" in capsys.readouterr().err
    assert page.read_text() == text


def test_a_page_needs_results(capsys):
    with pytest.raises(SystemExit) as exit_info:
        prove.main(["--page", "README.md"])
    assert exit_info.value.code == 2
    assert "give both" in capsys.readouterr().err
