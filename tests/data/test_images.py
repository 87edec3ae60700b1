import numpy as np
import pytest
import torch
from PIL import Image

from lightning_diffclf.data.images import find_images, open_image, transform


def save(path, image, **how):
    image.save(path, **how)
    return path


def gradient(height=6, width=9):
    return np.linspace(0, 255, height * width).round().astype(np.uint8).reshape(height, width)


def test_modes_become_rgb(tmp_path):
    grey = gradient()
    expected = np.stack([grey] * 3, axis=2)
    for name, image in {
        "l.png": Image.fromarray(grey),
        "rgb.png": Image.fromarray(expected),
        "rgba.png": Image.fromarray(np.concatenate([expected, np.full((6, 9, 1), 255, np.uint8)], axis=2)),
        "p.png": Image.fromarray(grey).convert("P"),
        "la.png": Image.fromarray(grey).convert("LA"),
        "sixteen.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "f.tiff": Image.fromarray(grey.astype(np.float32)),
    }.items():
        found = open_image(save(tmp_path / name, image))
        assert found.mode == "RGB"
        np.testing.assert_allclose(np.asarray(found).astype(int), expected, atol=1, err_msg=name)
    cmyk = open_image(save(tmp_path / "c.jpg", Image.fromarray(expected).convert("CMYK"), quality=100))
    assert np.abs(np.asarray(cmyk).astype(int) - expected).mean() < 8


def test_transparent_parts_are_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2, :, 3] = 255
    found = np.asarray(open_image(save(tmp_path / "t.png", Image.fromarray(pixels))))
    assert (found[:2] == 0).all()
    assert (found[2:] == 255).all()


def test_rotation_by_exif_is_undone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    path = save(tmp_path / "r.png", Image.fromarray(gradient()), exif=exif)
    found = open_image(path)
    assert found.size == (6, 9)
    np.testing.assert_array_equal(np.asarray(found)[..., 0], np.rot90(gradient(), -1))


def test_broken_files_are_named(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no picture")
    whole = save(tmp_path / "whole.png", Image.fromarray(gradient(60, 60))).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"image: '.*empty.png' is empty"):
        open_image(tmp_path / "empty.png")
    for name in ("text.jpg", "half.png"):
        with pytest.raises(ValueError, match=rf"image: '.*{name}' cannot be read"):
            open_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="image: no file"):
        open_image(tmp_path / "none.png")


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (16, 8)])
@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (8, 8), (5, 50)])
def test_images_are_resized_and_cropped_in_the_centre(size, shape):
    image = Image.fromarray(np.stack([gradient(*shape)] * 3, axis=2))
    found = transform(*size)(image)
    assert found.shape == (3, *size)
    assert found.dtype == torch.float32
    assert found.min() >= -1
    assert found.max() <= 1
    centre = (image.resize((1, 1), Image.BOX).getpixel((0, 0))[0]) / 127.5 - 1
    assert float(found.mean()) == pytest.approx(centre, abs=0.15)  # what is cut off is symmetric
    if shape == size:
        np.testing.assert_allclose(found[0], gradient(*shape) / 127.5 - 1, atol=1e-6)


def test_files_folders_and_patterns(tmp_path):
    (tmp_path / "sub" / ".copies").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "sub/c.webp", "notes.txt", "brackets[1].png", "._b.png", "sub/.copies/c.webp"):
        (tmp_path / name).write_bytes(b"x")
    folder = str(tmp_path)
    assert [p.name for p in find_images([folder])] == ["a.JPG", "b.png", "brackets[1].png", "c.webp"]
    assert [p.name for p in find_images([f"{folder}/*.png", f"{folder}/b.png"])] == ["b.png", "brackets[1].png"]
    assert [p.name for p in find_images([f"{folder}/brackets[1].png"])] == ["brackets[1].png"]
    with pytest.raises(FileNotFoundError, match="image: no file"):
        find_images([f"{folder}/z.png"])
    with pytest.raises(ValueError, match="has no image"):
        find_images([f"{folder}/*.gif"])
    with pytest.raises(ValueError, match="image: none given"):
        find_images([])
