"""Digits: tokens against a slow reading of each patch, the split, the batches, and data that changed."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from lib.tasks.digits import CLASSES, COUNT, PATCHES, SPLITS, TRAIN, Digits, all_images, checked, epoch_rows


def slow_tokens(image, patch):
    """Rows of the table for each token of one 8 x 8 list of lists, in plain Python."""
    found = []
    for top in range(0, 8, patch):
        for left in range(0, 8, patch):
            inside = [image[top + y][left + x] for y in range(patch) for x in range(patch)]
            found.append([18 * p + value for p, value in enumerate(inside)])
    return [*found, [18 * p + 17 for p in range(patch * patch)]]


@pytest.mark.parametrize("patch", PATCHES)
def test_tokens_are_the_pixels_of_each_patch_and_a_class_token(patch):
    task, (pixels, _) = Digits(patch), all_images()
    tokens = task.tokens(pixels)
    assert tokens.shape == (COUNT, task.length, patch**2) and tokens.dtype == torch.long
    assert 0 <= int(tokens.min()) and int(tokens.max()) == task.vocab - 1
    for i in range(0, COUNT, 200):
        assert tokens[i].tolist() == slow_tokens(pixels[i].tolist(), patch)


@pytest.mark.parametrize("patch", PATCHES)
def test_no_pixel_is_lost_on_the_way_to_tokens(patch):
    """The image is rebuilt from its tokens alone: value = row mod 18, place by the order of patches."""
    pixels = all_images().pixels
    n = 8 // patch
    values = (Digits(patch).tokens(pixels)[:, :-1] % 18).reshape(-1, n, n, patch, patch)
    assert values.permute(0, 1, 3, 2, 4).reshape(-1, 8, 8).equal(pixels)


def test_a_linear_patch_embedding_is_a_sum_of_rows():
    """Negative control beside it: with two rows exchanged the two differ."""
    task, pixels = Digits(patch=2), all_images().pixels[:50]
    W = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table = torch.zeros(task.vocab, 6, dtype=torch.float64)
    for p in range(4):
        for v in range(17):
            table[18 * p + v] = v * W[p]
    patches = pixels.reshape(50, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(50, 16, 4).double()
    summed = table[task.tokens(pixels)].sum(dim=2)[:, :-1]
    assert torch.allclose(summed, patches @ W, atol=1e-12)
    assert not torch.allclose(table.roll(1, 0)[task.tokens(pixels)].sum(dim=2)[:, :-1], patches @ W)


def test_the_split_is_fixed_and_its_parts_share_no_image():
    parts = [Digits().split(name) for name in SPLITS]
    assert [len(part.label) for part in parts] == [TRAIN, COUNT - TRAIN] == [1000, 797]
    seen = [{tuple(image) for image in part.pixels.flatten(1).tolist()} for part in parts]
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == COUNT, "no image occurs twice"
    assert Digits(4).split("train").label.equal(parts[0].label)
    for part in parts:
        counts = part.label.bincount(minlength=CLASSES)
        assert len(counts) == CLASSES and int(counts.min()) > 0.07 * len(part.label)


def test_the_images_are_those_of_scikit_learn():
    found = load_digits()
    assert np.array_equal(all_images().pixels.numpy(), found.images)
    assert np.array_equal(all_images().label.numpy(), found.target)


@pytest.mark.parametrize("change", ["pixel", "half a level", "label", "one image fewer"])
def test_data_that_changed_are_refused(change):
    pixels, label = load_digits().images.copy(), load_digits().target.copy()
    if change == "pixel":
        pixels[5, 0, 0] += 1
    elif change == "half a level":
        pixels[5, 0, 0] += 0.5
    elif change == "label":
        label[3] = (label[3] + 1) % 10
    else:
        pixels, label = pixels[:-1], label[:-1]
    with pytest.raises(ValueError, match="not the digits this book was measured on"):
        checked(pixels, label)


def test_an_epoch_shows_every_image_at_most_once_and_epochs_differ():
    rows = [epoch_rows(step, seed=3, size=64, n=300) for step in range(8)]
    first, second = torch.cat(rows[:4]).tolist(), torch.cat(rows[4:]).tolist()
    assert len(set(first)) == len(first) == 256 and max(first) < 300
    assert len(set(second)) == 256 and first != second
    assert rows[2].equal(epoch_rows(2, seed=3, size=64, n=300))
    assert not rows[2].equal(epoch_rows(2, seed=4, size=64, n=300))


@pytest.mark.parametrize("patch", [0, 3, 16, "2"])
def test_a_patch_divides_the_image(patch):
    with pytest.raises(ValueError, match=r"one of \(1, 2, 4, 8\), got"):
        Digits(patch)


@pytest.mark.parametrize(
    "pixels, message",
    [
        (torch.zeros(1, 8, 8), "torch.long"),
        (torch.zeros(1, 4, 4, dtype=torch.long), r"\(1, 4, 4\)"),
        (torch.full((1, 8, 8), 17), "0 to 16, got 17 to 17"),
        (torch.full((1, 8, 8), -1), "got -1"),
    ],
)
def test_images_that_do_not_fit_are_refused(pixels, message):
    with pytest.raises(ValueError, match=message):
        Digits().tokens(pixels)


def test_a_misspelt_split_and_an_impossible_batch_are_refused():
    with pytest.raises(ValueError, match="did you mean 'validation'"):
        Digits().split("validate")
    with pytest.raises(ValueError, match="1 to 1000 images, got size=1001"):
        epoch_rows(0, seed=0, size=1001)
