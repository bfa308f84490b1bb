"""Handwritten digits as tokens: 1,797 images of 8 x 8 pixels, read in patches by a Transformer.

    task = Digits(patch=2)
    task.tokens(images)            (B, 17, 4): 16 patches of 2 x 2 pixels and a class token, last
    task.split("train")            the 1,000 images of the fixed split; 797 are for validation

The images come with scikit-learn (its `load_digits`), a copy of the test set of the UCI digits of 13 writers,
bitmaps of 32 x 32 counted in blocks of 4 x 4: a pixel is a whole number from 0 to 16. The split is random
over images, so most writers are in both parts: it asks for new images, not for new hands.
Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.choices import check_choice

SIDE = 8  # pixels
LEVELS = 17  # of a pixel, 0 to 16
CLASSES = 10
COUNT = 1797
TRAIN = 1000  # images; the other 797 are for validation
SPLITS = ("train", "validation")
SPLIT_SEED = 0  # of the permutation that parts them, the same for every run
PATCHES = (1, 2, 4, 8)
# SHA-256 of all pixels, image by image and row by row, then all labels, a byte each
SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


class Images(NamedTuple):
    """B images and what they show."""

    pixels: Tensor  # (B, 8, 8) long, 0 .. 16
    label: Tensor  # (B,) long, 0 .. 9


@dataclass(frozen=True)
class Digits:
    """Images as tokens: one for each patch of `patch` x `patch` pixels, row by row, and a class token, last.

    A token is the sum of S = patch² embeddings, one for each pixel of the patch: row 18 p + v of the table
    for pixel p of the patch with value v. Any linear map of the patch is such a sum, with rows v times the
    map's column p, so this is the patch embedding of a vision Transformer with a free curve for each pixel.
    The class token is the sum of the rows with v = 17. Where a patch stands is told by learned positions.

    >>> task = Digits(patch=4)
    >>> task.length, task.vocab                       # 4 patches and the class token; 16 pixels x 18 values
    (5, 288)
    >>> image = torch.arange(64).reshape(1, 8, 8) % 17
    >>> task.tokens(image)[0, 1].tolist()             # the patch at the top right begins with pixel 4
    [4, 23, 42, 61, 84, 103, 122, 141, 147, 166, 185, 204, 227, 246, 265, 284]
    >>> image[0, 0, 4:].tolist()
    [4, 5, 6, 7]
    """

    patch: int = 2

    def __post_init__(self):
        if self.patch not in PATCHES:
            raise ValueError(f"patch divides {SIDE}: one of {PATCHES}, got {self.patch!r}")

    @property
    def length(self) -> int:
        """Tokens of an image: its patches and the class token."""
        return (SIDE // self.patch) ** 2 + 1

    @property
    def vocab(self) -> int:
        """Rows of the embedding table: 17 levels and the class mark for each pixel of a patch."""
        return self.patch**2 * (LEVELS + 1)

    def tokens(self, pixels: Tensor) -> Tensor:
        """pixels: (B, 8, 8) in 0 .. 16 -> (B, T, S) rows of the embedding table, to be summed."""
        if pixels.shape[1:] != (SIDE, SIDE) or pixels.dtype != torch.long:
            raise ValueError(f"images are torch.long (B, 8, 8), got {pixels.dtype} {tuple(pixels.shape)}")
        if len(pixels) and not 0 <= int(pixels.min()) <= int(pixels.max()) < LEVELS:
            raise ValueError(f"a pixel is 0 to 16, got {int(pixels.min())} to {int(pixels.max())}")
        p = self.patch
        parts = pixels.unfold(1, p, p).unfold(2, p, p)  # (B, 8/p, 8/p, p, p)
        parts = parts.flatten(3).flatten(1, 2)  # (B, T - 1, S)
        parts = torch.cat([parts, torch.full_like(parts[:, :1], LEVELS)], dim=1)
        return parts + (LEVELS + 1) * torch.arange(p * p)

    def split(self, name: str) -> Images:
        """The images of "train" (1,000) or "validation" (797), always the same."""
        check_choice("split", name, SPLITS)
        order = np.random.default_rng(SPLIT_SEED).permutation(COUNT)
        at = torch.from_numpy(order[:TRAIN] if name == "train" else order[TRAIN:])
        pixels, label = all_images()
        return Images(pixels[at], label[at])


def epoch_rows(step: int, *, seed: int, size: int, n: int = TRAIN) -> Tensor:
    """Which of n images step `step` sees: -> (size,). A function of (seed, step) alone.

    Each pass over the images is a fresh permutation, cut into n // size batches; what is left is dropped.
    """
    if not 1 <= size <= n:
        raise ValueError(f"a batch holds 1 to {n} images, got size={size}")
    epoch, part = divmod(step, n // size)
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return torch.from_numpy(order[part * size : (part + 1) * size])


@cache
def all_images() -> Images:
    """All 1,797 images in the order of scikit-learn. ValueError if they are not those of `SHA256`."""
    from sklearn.datasets import load_digits  # here: scikit-learn takes a second to import

    found = load_digits()
    return checked(found.images, found.target)


def checked(pixels: np.ndarray, label: np.ndarray) -> Images:
    """Pixels (n, 8, 8) and labels (n,) as `Images`, if they are the ones whose hash stands above."""
    whole = np.asarray(pixels).astype(np.uint8), np.asarray(label).astype(np.uint8)
    exact = np.array_equal(whole[0], pixels) and np.array_equal(whole[1], label)
    digest = hashlib.sha256(b"".join(part.tobytes() for part in whole)).hexdigest()
    if not exact or digest != SHA256:
        raise ValueError(
            f"these are not the digits this book was measured on: SHA-256 {digest}, expected {SHA256}; "
            "install the scikit-learn that requirements.txt names"
        )
    return Images(*(torch.from_numpy(part.astype(np.int64)) for part in whole))
