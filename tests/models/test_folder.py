"""Image folders: what counts as a class and an image, how files become squares, and folders and files that can't."""

import os
import pickle
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from models.data import load_dataset
from models.data.folder import ImageFolder, load_folder, read_image


def pixels(height=8, width=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path, array=None, mode=None, **options):
    """Write an array, a random RGB image by default, as the kind of file that the suffix says."""
    from PIL import Image

    array = pixels() if array is None else array
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def read(path, size=8):
    return read_image(path, size).permute(1, 2, 0).numpy()


def png(height, width, depth, color_type, rows, *chunks):
    """A PNG made by hand, for kinds that Pillow reads but does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*c) for c in chunks) + body + chunk(b"IEND", b"")


@pytest.fixture
def folder(tmp_path):
    """Two classes of three and two images, one of them deeper, among what is to be passed over."""
    root = tmp_path / "flowers"
    for seed, name in enumerate(["tulip/b.png", "tulip/a.PNG", "rose/2.Jpg", "rose/deep/er/1.png", "tulip/z/c.webp"]):
        save(root / name, pixels(seed=seed))
    for name in ["README.txt", ".DS_Store", "tulip/notes.md", "tulip/.hidden.png", "rose/._1.png"]:
        (root / name).write_text("no image")
    for name in [".git/x.png", "__MACOSX/y.png", "rose/.thumbnails/z.png", "rose/__MACOSX/z.png"]:
        save(root / name)
    return root


def test_subfolders_are_classes_by_name_and_hold_images_at_any_depth(folder):
    data = load_folder(folder, image_size=4)
    assert data.class_names == ("rose", "tulip") and data.num_classes == 2
    assert (data.name, data.channels, data.image_size) == (str(folder), 3, 4)
    assert data.holdout is None and data.autoencoder is None
    expected = ["rose/2.Jpg", "rose/deep/er/1.png", "tulip/a.PNG", "tulip/b.png", "tulip/z/c.webp"]
    assert [label.item() for _, label in data.train] == [0, 0, 1, 1, 1]
    for index, name in enumerate(expected):
        image, label = data.train[index]
        assert image.dtype == torch.uint8 and image.shape == (3, 4, 4)
        assert label.dtype == torch.int64 and label.ndim == 0
        assert torch.equal(image, read_image(folder / name, 4)), name
    with pytest.raises(IndexError):
        data.train[5]


def test_links_are_followed_without_looping_or_leaving_the_class(folder, tmp_path):
    save(tmp_path / "elsewhere" / "x.png")
    (folder / "rose" / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "rose" / "more again").symlink_to(tmp_path / "elsewhere")  # the same images, once
    (folder / "rose" / "deep" / "loop").symlink_to(folder / "rose")
    (folder / "tulip" / "up").symlink_to(folder)
    (folder / "tulip" / "top").symlink_to(tmp_path)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    images = ImageFolder(folder, 4)
    assert images.class_names == ("linked", "rose", "tulip")
    assert images.labels.bincount().tolist() == [1, 3, 3]


def test_scanning_opens_no_file(folder, monkeypatch):
    (folder / "rose" / "broken.png").write_bytes(b"")
    assert len(ImageFolder(folder, 4)) == 6


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loading_processes_give_the_same_images(folder, method):
    images = ImageFolder(folder, 4)
    loader = DataLoader(images, 2, num_workers=1, multiprocessing_context=method)
    batches = [image for image, _ in loader]
    assert torch.equal(torch.cat(batches), torch.stack([image for image, _ in images]))


def test_a_large_folder_is_small_to_send_to_a_loading_process(tmp_path):
    (tmp_path / "a").mkdir()
    for index in range(1000):
        (tmp_path / "a" / f"{index:05}.png").touch()
    size = len(os.fsencode(tmp_path / "a" / "00000.png"))
    assert len(pickle.dumps(ImageFolder(tmp_path, 4))) < 1000 * (size + 8) + 2000


def test_draw_scales_and_flips_each_image_by_its_own_coin(folder):
    levels = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16).expand(400, -1, -1, -1)
    plain = load_folder(folder, flip=False).draw(levels)
    assert plain.dtype == torch.float32 and plain.shape == (400, 3, 16, 16)
    assert torch.equal(plain[0, 0].flatten(), torch.arange(256) / 127.5 - 1)
    torch.manual_seed(1)
    drawn = load_folder(folder, flip=True).draw(levels)
    mirrored = (drawn == plain.flip(-1)).flatten(1).all(1)
    assert torch.equal(drawn[~mirrored], plain[~mirrored])
    assert 150 < mirrored.sum() < 250
    torch.manual_seed(1)  # what a resumed run restores
    assert torch.equal(load_folder(folder).draw(levels), drawn)


def test_drawing_without_flips_leaves_the_generator_alone(folder):
    state = torch.get_rng_state()
    load_folder(folder, flip=False).draw(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("shape", [(8, 8), (37, 50), (50, 37), (16, 31), (3, 5), (1, 1), (64, 9)])
def test_squares_are_those_of_guided_diffusion(tmp_path, shape):
    from PIL import Image

    path = save(tmp_path / "x.png", pixels(*shape))
    image = Image.open(path)
    while min(image.size) >= 16:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = 8 / min(image.size)
    array = np.array(image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC))
    top, left = (array.shape[0] - 8) // 2, (array.shape[1] - 8) // 2
    assert np.array_equal(read(path), array[top : top + 8, left : left + 8])


def test_grey_levels_are_repeated(tmp_path):
    grey = pixels(channels=1)
    assert np.array_equal(read(save(tmp_path / "x.png", grey)), grey.repeat(3, axis=2))


def test_a_bitmap_is_black_and_white(tmp_path):
    bits = pixels(channels=1) > 127
    assert np.array_equal(read(save(tmp_path / "x.png", bits)), bits.repeat(3, axis=2) * np.uint8(255))


@pytest.mark.parametrize("channels", [2, 4])
def test_transparent_images_are_laid_on_white(tmp_path, channels):
    array = pixels(channels=channels)
    array[0, :, -1], array[1, :, -1], array[2:, :, -1] = 0, 255, 128
    image = read(save(tmp_path / "x.png", array))
    colours = np.broadcast_to(array[..., :-1], (8, 8, 3))
    assert (image[0] == 255).all()
    assert np.array_equal(image[1], colours[1])
    assert np.abs(image[2:] - (colours[2:] * (128 / 255) + 255 * (127 / 255))).max() <= 1


def test_palettes_with_and_without_transparency(tmp_path):
    from PIL import Image

    image = Image.new("P", (8, 8), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((3, 2), 0)
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "transparent.gif", transparency=0)
    opaque, transparent = read(tmp_path / "opaque.png"), read(tmp_path / "transparent.gif")
    assert opaque[2, 3].tolist() == [10, 20, 30] and transparent[2, 3].tolist() == [255, 255, 255]
    assert opaque[0, 0].tolist() == transparent[0, 0].tolist() == [40, 50, 60]


def test_a_transparent_colour_of_a_grey_image_is_white(tmp_path):
    grey = np.full((8, 8), 9, np.uint8)
    grey[0] = 77
    image = read(save(tmp_path / "x.png", grey, transparency=9))
    assert (image[0] == 77).all() and (image[1:] == 255).all()


def test_a_transparent_level_of_a_sixteen_bit_image_is_white(tmp_path):
    grey = np.full((8, 8), 20000, np.uint16)
    grey[0], grey[1] = 40000, 20001  # its neighbour is another level
    image = read(save(tmp_path / "x.png", grey, transparency=20000))
    assert (image[0] == 156).all() and (image[1] == 78).all() and (image[2:] == 255).all()


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, name):
    levels = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    image = read(save(tmp_path / name, levels))
    assert np.array_equal(image[..., 0], np.round(levels / 257)) and (image == image[..., :1]).all()


def test_big_endian_sixteen_bit_tiff(tmp_path):
    levels = np.linspace(0, 65535, 64).round().astype(">u2")
    # Width, height, bits, no compression, black is zero, offset, rows in the strip, bytes in the strip.
    tags = [(256, 8), (257, 8), (258, 16), (259, 1), (262, 1), (273, 110), (278, 8), (279, 128)]
    entries = b"".join(struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    content = b"MM\0*" + struct.pack(">IH", 8, len(tags)) + entries + bytes(4)
    (tmp_path / "x.tif").write_bytes(content + levels.tobytes())
    assert len(content) == 110
    assert np.array_equal(read(tmp_path / "x.tif")[..., 0].flatten(), np.round(levels / 257))


@pytest.mark.parametrize(("channels", "color_type"), [(3, 2), (4, 6)])
def test_sixteen_bit_colour(tmp_path, channels, color_type):
    levels = np.random.default_rng(0).integers(0, 65536, (8, 8, channels), dtype=np.uint16)
    levels[..., 3:] = 65535
    (tmp_path / "x.png").write_bytes(png(8, 8, 16, color_type, levels.astype(">u2")))
    assert np.abs(read(tmp_path / "x.png") - levels[..., :3] / 257).max() < 1


def test_cmyk(tmp_path):
    red = np.zeros((8, 8, 4), np.uint8)
    red[..., 1:3] = 255
    from PIL import Image

    Image.fromarray(red, mode="CMYK").save(tmp_path / "x.tif")
    assert (read(tmp_path / "x.tif") == [255, 0, 0]).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(tmp_path, suffix, orientation):
    from PIL import Image

    quadrants = np.array([[0, 80], [160, 240]], np.uint8).repeat(8, 0).repeat(8, 1)
    stored = {
        1: quadrants,
        2: quadrants[:, ::-1],
        3: quadrants[::-1, ::-1],
        4: quadrants[::-1],
        5: quadrants.T,
        6: np.rot90(quadrants),
        7: quadrants[::-1, ::-1].T,
        8: np.rot90(quadrants, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"x.{suffix}", np.ascontiguousarray(stored), mode="RGB", exif=exif)
    assert np.abs(read(path, 16)[4::8, 4::8, 0].astype(int) - quadrants[4::8, 4::8]).max() < 12


def test_of_an_animation_the_first_frame(tmp_path):
    from PIL import Image

    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("x.gif", "x.png", "x.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        red, _, blue = read(tmp_path / name)[4, 4]
        assert red > 240 and blue < 15, name


@pytest.mark.parametrize(
    ("dtype", "top", "message"), [(np.float32, 1.0, "mode F"), (np.int32, 200, "mode I"), (np.int32, 70000, "mode I")]
)
def test_levels_of_unknown_range_are_refused(tmp_path, dtype, top, message):
    path = save(tmp_path / "x.tif", np.full((8, 8), top, dtype))
    with pytest.raises(ValueError, match=rf"x.tif can't be read .*{message}.*convert"):
        read(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif", "bmp"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9])
def test_a_truncated_image_is_named(tmp_path, suffix, keep):
    path = save(tmp_path / "a" / f"x.{suffix}", pixels(64, 64))
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    data = load_folder(tmp_path, image_size=8)
    with pytest.raises(ValueError, match=rf"the image .*a.x\.{suffix} can't be read .*remove"):
        data.train[0]


@pytest.mark.parametrize("make", [lambda p: p.write_text("hello"), lambda p: p.symlink_to("nowhere"), Path.touch])
def test_what_is_no_image_is_named(tmp_path, make):
    (tmp_path / "a").mkdir()
    make(tmp_path / "a" / "x.png")
    with pytest.raises(ValueError, match=r"a.x\.png can't be read"):
        load_folder(tmp_path).train[0]


def test_the_message_survives_a_loading_process(tmp_path):
    save(tmp_path / "a" / "x.png").write_text("hello")
    batches = iter(DataLoader(ImageFolder(tmp_path, 8), num_workers=1))
    with pytest.raises(ValueError, match=r"a.x\.png can't be read"):
        next(batches)


def test_a_decompression_bomb_is_refused(tmp_path):
    (tmp_path / "x.png").write_bytes(png(20000, 20000, 8, 2, []))
    with pytest.raises(ValueError, match=r"x.png is too large .*scale it down"):
        read(tmp_path / "x.png")


def missing(root):
    return root / "nowhere", "nowhere does not exist: pass a folder"


def a_file(root):
    return save(root / "x.png"), "x.png is not a folder: pass a folder"


def stray_image(root):
    save(root / "a" / "x.png")
    save(root / "stray.JPG", format="JPEG")
    return root, r"holds the image stray.JPG beside its class folders.*move images into"


def images_alone(root):
    save(root / "x.png")
    return root, "holds the image x.png beside its class folders"


def nothing(root):
    (root / ".git").mkdir()
    return root, "holds no class folder: put the images"


def empty_class(root):
    save(root / "a" / "x.png")
    (root / "b" / "deep").mkdir(parents=True)
    (root / "b" / "deep" / "notes.txt").touch()
    return root, r"class folder .*b holds no image.*\.jpeg.*put images in, or remove it"


@pytest.mark.parametrize("make", [missing, a_file, stray_image, images_alone, nothing, empty_class])
def test_folders_that_are_no_dataset(tmp_path, make):
    path, message = make(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_folder(path)
    with pytest.raises(ValueError, match=message):
        load_dataset(str(path))


@pytest.mark.parametrize("size", [0, -4, 2.5, "256"])
def test_image_size_is_checked(folder, size):
    with pytest.raises(ValueError, match="image_size must be a whole number"):
        load_folder(folder, image_size=size)


def test_without_pillow_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        load_folder(folder)


def test_load_dataset_takes_folders(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for name in ("flowers", "./flowers", str(folder)):
        data = load_dataset(name, image_size=16, flip=False)
        assert data.name == name and data.image_size == 16 and len(data.train) == 5
        assert torch.equal(data.draw(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)), torch.full((1, 3, 2, 2), -1.0))
    with pytest.raises(ValueError, match="flowers.7 does not exist"):
        load_dataset("flowers/7")
    with pytest.raises(ValueError, match=r"unknown dataset 'flower'.*Otherwise pass the path of a folder"):
        load_dataset("flower")


def test_a_folder_called_as_a_dataset_is_reached_by_its_path(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    folder.rename("digits")
    assert load_dataset("digits").image_size == 8 and load_dataset("./digits").class_names == ("rose", "tulip")
