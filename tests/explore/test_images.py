"""Promises about images: probabilities equal a direct computation, any image works, unused patches are grey."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm", reason="the vision extra is not installed")

from PIL import Image

import moh
from moh.explore.images import read_image, shaded_picture, time_image
from moh.explore.subjects import ImageSubject, load_subject


def noise(mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Image.Image:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).convert(mode)


def values(image: Image.Image) -> torch.Tensor:
    return torch.tensor(np.array(image)).float()


def test_classes_are_those_of_the_model_at_the_share(image_subject: ImageSubject) -> None:
    seen = read_image(image_subject, noise(), 1)
    with moh.active_heads(image_subject.model, 1), torch.no_grad():
        p = image_subject.model(seen.pixels[None])[0].softmax(-1)
    expected = [(image_subject.classes[i], float(p[i])) for i in p.argsort(descending=True)[:5].tolist()]
    assert [name for name, _ in seen.classes] == [name for name, _ in expected]
    assert [value for _, value in seen.classes] == pytest.approx([value for _, value in expected], rel=1e-5)
    assert image_subject.reference is not None and seen.reference_classes is not None
    with torch.no_grad():
        top = image_subject.reference.model(seen.pixels[None])[0].softmax(-1).max()
    assert seen.reference_classes[0][1] == pytest.approx(float(top), rel=1e-5)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "LA"])
@pytest.mark.parametrize("size", [(1, 1), (3, 50), (640, 12)], ids=["1x1", "3x50", "640x12"])
def test_an_image_of_any_mode_and_size_is_seen(image_subject: ImageSubject, mode: str, size: tuple[int, int]) -> None:
    seen = read_image(image_subject, noise(mode, size), 1)
    assert seen.image.size == (8, 8) and len(seen.classes) == 5


def test_a_photograph_is_turned_upright(image_subject: ImageSubject) -> None:
    image = noise()
    image.getexif()[274] = 6  # rotate by 90 degrees for display
    turned = read_image(image_subject, noise().transpose(Image.Transpose.ROTATE_270), 1)
    torch.testing.assert_close(read_image(image_subject, image, 1).pixels, turned.pixels)


def test_patches_that_did_not_use_a_head_are_grey(image_subject: ImageSubject) -> None:
    seen = read_image(image_subject, noise(), 1)
    layer, head = next(
        (number, head)
        for number, layer in enumerate(seen.layers)
        for head in range(5)
        if 0 < int((layer.gates[0, :, head] > 0).sum()) < 16
    )
    picture = shaded_picture(seen, layer, head)
    side = picture.width // 4
    used = (seen.layers[layer].gates[0, :, head] > 0).view(4, 4)
    for row in range(4):
        for column in range(4):
            box = (column * side, row * side, (column + 1) * side, (row + 1) * side)
            shown = values(picture.crop(box))
            original = seen.image.resize(picture.size, Image.Resampling.NEAREST).crop(box)
            faded = (shown - 128).abs().mean() / (values(original) - 128).abs().mean()
            assert bool(faded > 0.5) is bool(used[row, column])


def test_a_layer_or_head_that_is_not_there_is_named(image_subject: ImageSubject) -> None:
    seen = read_image(image_subject, noise(), 1)
    with pytest.raises(ValueError, match=r"layer must be between 0 and 1, got 2"):
        shaded_picture(seen, 2, 0)
    with pytest.raises(ValueError, match=r"head must be between 0 and 4, got 9"):
        shaded_picture(seen, 0, 9)


def test_a_dense_classifier_is_shown_as_what_it_is(classifier_dirs: dict[str, Path]) -> None:
    subject = load_subject(classifier_dirs["dense"])
    assert isinstance(subject, ImageSubject)
    assert subject.dial.values == () and subject.facts.startswith("A dense model")
    seen = read_image(subject, noise(), None)
    assert seen.reference_classes is None and all(layer.config is None for layer in seen.layers)
    assert time_image(subject, seen, None)[1] is None


def test_learned_gates_are_not_passed_off_as_the_dense_model(classifier_dirs: dict[str, Path]) -> None:
    assert load_subject(classifier_dirs["75"]).reference is None


def test_times_are_measured_for_both(image_subject: ImageSubject) -> None:
    seen = read_image(image_subject, noise(), 1)
    own, other = time_image(image_subject, seen, 1)
    assert own > 0 and other is not None and other > 0
