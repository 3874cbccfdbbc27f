"""Pictures: what is coloured, what is not, and that every name can be read."""

import colorsys
import itertools

import numpy as np
import pytest
from scipy import ndimage

from tfmaskformer import visualize
from tfmaskformer.config import MaskFormerConfig
from tfmaskformer.visualize import OPACITY, palette, panoptic_overlay, semantic_overlay, side_by_side

CONFIG = MaskFormerConfig(name="drawn", num_classes=4, class_names=("cat", "sky-other-merged", "grass", "dog"), thing_classes=(0, 3))


def quarters(height=240, width=320):
    """Two cats above, grass and nothing below."""
    segments = np.zeros((height, width), np.int32)
    segments[: height // 2, : width // 2] = 1
    segments[: height // 2, width // 2 :] = 2
    segments[height // 2 :, : width // 2] = 3
    return segments, [
        {"id": 1, "isthing": True, "category_id": 0},
        {"id": 2, "isthing": True, "category_id": 0},
        {"id": 3, "isthing": False, "category_id": 2},
    ]


@pytest.fixture
def written(monkeypatch):
    """(mask, top, left, height, width) of every name that is written."""
    boxes = []
    place = visualize._place

    def spy(mask, taken, width, height):
        found = place(mask, taken, width, height)
        if found is not None:
            boxes.append((mask, *found, height, width))
        return found

    monkeypatch.setattr(visualize, "_place", spy)
    return boxes


def test_segments_have_their_colours_and_the_rest_is_the_image():
    segments, infos = quarters()
    image = np.full((240, 320, 3), 100, np.uint8)
    before = image.copy()
    picture = panoptic_overlay(image, segments, infos, CONFIG)
    assert picture.dtype == np.uint8
    assert picture.shape[1:] == (320, 3)
    assert picture.shape[0] > 240  # the legend
    np.testing.assert_array_equal(image, before)
    expected = np.round(100 + OPACITY * (palette(4).astype(np.float32) - 100))
    np.testing.assert_array_equal(picture[5, 5], expected[0])
    np.testing.assert_array_equal(picture[235, 5], expected[2])
    np.testing.assert_array_equal(picture[130:240, 170:], image[130:240, 170:])
    assert np.abs(picture[5, 315].astype(int) - picture[5, 5]).max() > 30  # the second cat is another shade
    np.testing.assert_array_equal(picture[5, 159], [255, 255, 255])  # border between the cats
    np.testing.assert_array_equal(picture, panoptic_overlay(image, segments, infos, CONFIG))


def test_segments_have_the_hue_of_their_class_in_the_legend():
    """Of a photograph in the opposite colour, and of many instances."""
    segments = np.repeat(np.arange(1, 21), 20)[np.newaxis].repeat(200, 0)
    infos = [{"id": index, "isthing": True, "category_id": 0} for index in range(1, 21)]
    red = np.array([[250, 20, 20]] * 4, np.uint8)
    picture = panoptic_overlay(np.full((200, 400, 3), [0, 200, 200], np.uint8), segments, infos, CONFIG, red)
    shades = {tuple(picture[5, 20 * index + 5]) for index in range(20)}
    assert len(shades) >= 12
    for shade in shades:
        hue, saturation, _ = colorsys.rgb_to_hsv(*(np.array(shade) / 255))
        assert min(hue, 1 - hue) < 0.04
        assert saturation > 0.2


def test_given_colours_are_used():
    segments, infos = quarters()
    colours = np.array([[0, 0, 0], [0, 0, 0], [10, 200, 30], [0, 0, 0]], np.uint8)
    picture = panoptic_overlay(np.zeros((240, 320, 3)), segments, infos, CONFIG, colours)
    np.testing.assert_array_equal(picture[235, 5], np.round(OPACITY * colours[2].astype(np.float32)))
    assert (picture[240:] == colours[2]).all(-1).sum() > 50  # the swatch


def test_legend_shows_the_classes_that_are_there():
    segments, infos = quarters()
    picture = panoptic_overlay(np.zeros((240, 320, 3), np.uint8), segments, infos, CONFIG)
    present = [(picture[240:] == colour).all(-1).sum() > 50 for colour in palette(4)]
    assert present == [True, False, True, False]
    nothing = panoptic_overlay(np.full((240, 320, 3), 7, np.uint8), np.zeros((240, 320), int), [], CONFIG)
    np.testing.assert_array_equal(nothing, np.full((240, 320, 3), 7))


@pytest.mark.parametrize(("height", "width"), [(240, 320), (750, 1000)])
def test_names_lie_in_their_segments_and_apart(written, height, width):
    rng = np.random.default_rng(3)
    centres = rng.uniform(0, 1, (25, 2)) * [height, width]
    y, x = np.mgrid[:height, :width]
    segments = 1 + np.argmin([np.hypot(y - centre[0], x - centre[1]) for centre in centres], 0)
    infos = [{"id": index + 1, "isthing": True, "category_id": index % 4} for index in range(25)]
    picture = panoptic_overlay(np.full((height, width, 3), 128, np.uint8), segments, infos, CONFIG)
    assert len(written) >= 15
    for mask, top, left, box_height, box_width in written:
        inside = mask[top : top + box_height, left : left + box_width]
        assert inside.shape == (box_height, box_width)
        assert inside.mean() >= 0.75
        text = picture[top : top + box_height, left : left + box_width]
        assert (text.min(-1) > 200).sum() > 10  # white …
        assert (text.max(-1) < 30).sum() > 10  # … with a black outline
    assert_apart(written)


def assert_apart(boxes):
    for (_, top, left, height, width), (_, other_top, other_left, other_height, other_width) in itertools.combinations(boxes, 2):
        apart_y = top + height <= other_top or other_top + other_height <= top
        assert apart_y or left + width <= other_left or other_left + other_width <= left


def test_names_that_do_not_fit_stay_in_the_legend(written):
    segments = np.zeros((240, 320), int)
    segments[:, 100:106] = 1
    segments[:4] = 2
    infos = [{"id": 1, "isthing": True, "category_id": 3}, {"id": 2, "isthing": False, "category_id": 1}]
    picture = panoptic_overlay(np.zeros((240, 320, 3)), segments, infos, CONFIG)
    assert written == []
    assert picture.shape[0] > 240


def test_a_name_stands_in_the_largest_piece(written):
    """Two pieces far apart, and an island between them that would hold the name as well."""
    segments = np.zeros((240, 640), int)
    segments[:, :200] = segments[80:140, 300:400] = segments[:, 450:] = 1
    panoptic_overlay(np.zeros((240, 640, 3)), segments, [{"id": 1, "isthing": True, "category_id": 0}], CONFIG)
    [(_, top, left, height, width)] = written
    assert abs(top + height / 2 - 120) < 20
    assert abs(left + width / 2 - 100) < 20


def test_the_largest_piece_is_that_of_scipy():
    rng = np.random.default_rng(5)
    for index in range(300):
        mask = rng.random(rng.integers(1, 14, 2)) < index / 300
        labels, _ = ndimage.label(mask)
        areas = np.bincount(labels[mask])
        piece = visualize._largest_piece(mask)
        assert piece.sum() == areas.max(initial=0)
        assert len(np.unique(labels[piece])) <= 1
        assert not (piece & ~mask).any()


@pytest.mark.parametrize("lower", range(9, 14))
def test_names_avoid_each_other_where_it_is_narrow(written, lower):
    """A bar as high as its name, and below it one too narrow for a name that does not reach into the upper one."""
    segments = np.zeros((240, 320), int)
    segments[100:111] = 1
    segments[111 : 111 + lower] = 2
    segments[100:111, 0] = 2
    infos = [{"id": 1, "isthing": True, "category_id": 0}, {"id": 2, "isthing": True, "category_id": 3}]
    panoptic_overlay(np.zeros((240, 320, 3)), segments, infos, CONFIG)
    assert_apart(written)
    assert len(written) == (1 if lower == 9 else 2)


def test_semantic_overlay_ignores_what_is_no_class():
    classes = np.full((240, 320), 255, np.uint8)
    classes[:120] = 0
    classes[120:200] = 3
    picture = semantic_overlay(np.full((240, 320, 3), 50, np.uint8), classes, CONFIG)
    for row, category in ((5, 0), (125, 3)):
        np.testing.assert_array_equal(picture[row, 5], np.round(50 + OPACITY * (palette(4)[category].astype(np.float32) - 50)))
    np.testing.assert_array_equal(picture[202:240], 50)


def test_side_by_side():
    images = [np.full((50, 200, 3), 10, np.uint8), np.full((80, 120, 3), 20, np.uint8)]
    picture = side_by_side(images, ["PyTorch (official)", "a title much too wide for it"])
    top = picture.shape[0] - 80
    np.testing.assert_array_equal(picture[top : top + 50, :200], images[0])
    np.testing.assert_array_equal(picture[top:, -120:], images[1])
    assert (picture[:top, :200].min(-1) < 100).any()
    assert (picture[:top, 202:205] == 255).all()  # the long title stays above its image
    assert (picture[:top, -120:].min(-1) < 100).any()


def test_palette_has_distinct_colours():
    colours = palette(133).astype(int)
    distance = np.abs(colours[:, None] - colours[None]).sum(-1)
    assert distance[~np.eye(133, dtype=bool)].min() >= 8
    np.testing.assert_array_equal(palette(5), palette(133)[:5])


def test_bad_input_is_told():
    segments, infos = quarters()
    with pytest.raises(ValueError, match=r"same size; got \(100, 320, 3\) and \(240, 320\)"):
        panoptic_overlay(np.zeros((100, 320, 3)), segments, infos, CONFIG)
    with pytest.raises(ValueError, match="category ids are 0 … 2, but there are 2 colours"):
        panoptic_overlay(np.zeros((240, 320, 3)), segments, infos, CONFIG, palette(2))
    with pytest.raises(ValueError, match="1 images with 2 titles"):
        side_by_side([np.zeros((5, 5, 3), np.uint8)], ["a", "b"])


def test_classes_without_names_are_numbered():
    assert visualize._name(MaskFormerConfig(name="unnamed", num_classes=20), 17) == "class 17"
