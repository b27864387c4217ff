import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.data.augment import normalize, random_crop_flip
from effjax.data.shift import permute_labels, permute_pixels


def pictures(n: int = 6, height: int = 5, width: int = 7, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, (n, height, width, channels), dtype=np.uint8)


@settings(max_examples=30, deadline=None)
@given(padding=st.integers(0, 3), flip=st.booleans(), seed=st.integers(0, 9))
def test_every_crop_is_a_window_of_the_padded_image(padding, flip, seed):
    if not padding and not flip:
        return
    images = pictures()
    out = random_crop_flip(images, np.random.default_rng(seed), padding=padding, flip=flip)
    assert out.shape == images.shape
    assert out.dtype == images.dtype
    height, width = images.shape[1:3]
    for image, crop in zip(images, out, strict=True):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        windows = [
            padded[top : top + height, left : left + width]
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
        ]
        found = any(np.array_equal(crop, window) for window in windows)
        mirrored = any(np.array_equal(crop, window[:, ::-1]) for window in windows)
        assert found or (flip and mirrored)


def test_crops_and_flips_vary_over_the_batch():
    images = np.repeat(pictures(1), 200, axis=0)
    flipped = random_crop_flip(images, np.random.default_rng(0), padding=0)
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    assert 60 < mirrored.sum() < 140
    cropped = random_crop_flip(images, np.random.default_rng(0), padding=1, flip=False)
    assert len(np.unique(cropped.reshape(200, -1), axis=0)) == 9


def test_augmentation_is_checked():
    with pytest.raises(ValueError, match="changes nothing"):
        random_crop_flip(pictures(), np.random.default_rng(0), padding=0, flip=False)
    with pytest.raises(ValueError, match=r"images has shape \(5, 7, 3\)"):
        random_crop_flip(pictures()[0], np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"std=\[1.0, 0.0\] must be above 0"):
        normalize(pictures(), 0.5, (1.0, 0.0))


def test_normalize_is_the_same_on_both_sides():
    images, mean, std = pictures(), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    host, device = normalize(images, mean, std), normalize(jnp.asarray(images), mean, std)
    assert host.dtype == device.dtype == np.float32
    np.testing.assert_allclose(host, (images / 255 - mean) / std, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(device, host, rtol=1e-5, atol=1e-6)


def test_pixels_move_alike_in_every_image_and_channel():
    images, label = pictures(), np.arange(6)
    out = permute_pixels(3, images.shape[1:])({"image": images, "label": label})
    assert out["label"] is label
    before, after = (x.reshape(6, 35, 3) for x in (images, out["image"]))
    place = np.argsort(permute_pixels(3, (5, 7, 1))({"image": np.arange(35).reshape(1, 5, 7, 1)})["image"].ravel())
    assert np.array_equal(after[:, place], before)
    assert not np.array_equal(after, before)
    assert not np.array_equal(permute_pixels(4, images.shape[1:])({"image": images})["image"], out["image"])
    with pytest.raises(ValueError, match=r"permutation is for \[n, \*\(4, 4, 1\)\]"):
        permute_pixels(1, (4, 4, 1))({"image": images})


@given(seed=st.integers(0, 50), classes=st.integers(2, 12))
@settings(deadline=None)
def test_labels_are_renamed_one_to_one_and_some_change(seed, classes):
    labels = np.arange(classes, dtype=np.int32)
    renamed = permute_labels(seed, classes)({"label": labels})["label"]
    assert renamed.dtype == np.int32
    assert sorted(renamed) == list(range(classes))
    assert (renamed != labels).any()


def test_labels_are_checked():
    with pytest.raises(ValueError, match=r"lies in \[0, 3\], outside \[0, 3\)"):
        permute_labels(1, 3)({"label": np.array([0, 3])})
    with pytest.raises(ValueError, match="classes=1"):
        permute_labels(1, 1)
