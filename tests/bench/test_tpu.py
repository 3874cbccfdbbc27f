"""The search for the largest batch that fits on a TPU, and the page of what was found."""

import json

import pytest

from bench import tpu
from checkpoints import registry


def stats(peak_bytes, rematerialized=0):
    return {"peak_hbm_bytes": peak_bytes, "argument_bytes": 100, "rematerialized": rematerialized, "flops": 1e9}


def compiler(limit_bytes, an_image_bytes, saved=0):
    """Of a program with 100 bytes of variables, 40 of constants, and ``saved`` bytes that computing again saves."""

    def compile_(batch):
        needed = 140 + batch * an_image_bytes
        return stats(min(needed, limit_bytes), int(needed > limit_bytes)) if needed - saved <= limit_bytes else None

    return compile_


def search(compile_, limit_bytes, others=(), doubling=False):
    found = {}
    while (batch := tpu.next_batch(found, limit_bytes, others, doubling)) is not None:
        assert str(batch) not in found
        found[str(batch)] = compile_(batch)
    return found


@pytest.mark.parametrize(("limit", "an_image", "saved"), [(10_000, 310, 0), (10_000, 10, 0), (10_000, 9_000, 0), (10_000, 130, 3_000)])
def test_the_search_ends_at_the_largest_batch_that_fits(limit, an_image, saved):
    found = search(compiler(limit, an_image, saved), limit)
    largest = (limit + saved - 140) // an_image
    assert found[str(largest)] is not None
    assert found[str(largest + 1)] is None
    assert tpu.bounds(found) == (largest, largest + 1)
    if not saved:
        assert len(found) <= 5


@pytest.mark.parametrize(("an_image", "saved", "largest"), [(310, 0, 16), (10, 0, 512), (9_000, 0, 1), (130, 3_000, 64), (11_000, 0, 0)])
def test_the_search_among_powers_of_two(an_image, saved, largest):
    found = search(compiler(10_000, an_image, saved), 10_000, doubling=True)
    assert all(int(batch).bit_count() == 1 for batch in found)
    assert tpu.bounds(found) == (largest, max(2 * largest, 1))
    assert tpu._largest(found, True) == (str(largest) if largest else "–")
    assert len(found) <= 5
    assert tpu._largest({"1": stats(9)}, True) == ""


def test_another_target_saves_compilations():
    other = search(compiler(10_000, 310), 10_000)
    assert len(search(compiler(9_500, 310), 9_500, [other])) == 3


def test_nothing_fits():
    found = search(lambda batch: None, 10_000)
    assert found == {"1": None}
    assert tpu._largest(found) == "–"


def test_what_is_missing_is_told_from_what_does_not_fit():
    cells = [tpu._largest(found) for found in ({}, {"1": stats(9)}, {"1": stats(9), "7": stats(9)}, {"1": stats(9), "2": None})]
    assert cells == ["", "", "≥ 7", "1"]
    name = registry.entries()[0].name
    rows = {}
    for found in ({"v5e:2x2": {"1": None}}, {"v5e:2x2": {"1": stats(2**30, 3)}}):
        page = tpu.page({"eval": {name: found}})
        rows[str(found)] = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
    does_not_fit, fits = rows.values()
    assert does_not_fit == f"| {name} | 512×1024 | – | – |  |  |  |"
    assert fits == f"| {name} | 512×1024 | 1.00 GiB* |  |  |  | 1e+09 |"


def test_the_page_shows_what_was_compiled():
    results = json.loads(tpu.RESULTS.read_text(encoding="utf-8"))
    text = tpu.PAGE.read_text(encoding="utf-8")
    assert text == tpu.page(results), "python -m bench.tpu writes both"
    evaluation, training = text.split("## Training")
    for entry in registry.entries():
        assert f"\n| {entry.name} | " in evaluation
    assert all(f"\n| {name} | " in training for name in tpu.TRAINED)
    for step, columns in tpu.COLUMNS.items():
        for name, found in results.get(step, {}).items():
            assert set(found) <= set(columns), name


def test_every_backbone_is_trained():
    backbones = {json.dumps(entry.config["backbone"], sort_keys=True) for entry in registry.entries()}
    assert {json.dumps(registry.entry(name).config["backbone"], sort_keys=True) for name in tpu.TRAINED} == backbones
    assert len(backbones) == 7
