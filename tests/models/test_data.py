"""The digits split, label checks, and the image files that sampling writes and evaluation reads."""

import hashlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from models.data import (
    check_labels,
    collect,
    from_uint8,
    load_dataset,
    load_npz,
    rank_in_class,
    save_grid,
    save_npz,
    to_uint8,
)
from models.data.splits import check_values


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def random_uint8(count, channels=1, size=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, size, size, channels), dtype=torch.uint8, generator=generator)


def test_digits_are_split_1297_to_500_evenly_by_class(digits):
    (train, train_labels), (holdout, holdout_labels) = digits.train.tensors, digits.holdout.tensors
    assert train.shape == (1297, 1, 8, 8) and holdout.shape == (500, 1, 8, 8)
    assert (digits.name, digits.num_classes, digits.image_size, digits.channels) == ("digits", 10, 8, 1)
    assert holdout_labels.bincount().tolist() == [50] * 10
    assert train_labels.bincount().tolist() == [128, 132, 127, 133, 131, 132, 131, 129, 124, 130]
    for images, labels in (digits.train.tensors, digits.holdout.tensors):
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.min() == -1 and images.max() == 1
    image, label = digits.train[0]
    assert image.shape == (1, 8, 8) and label.ndim == 0


def test_digits_splits_are_the_whole_dataset_without_overlap(digits):
    from sklearn.datasets import load_digits

    both = torch.cat([digits.train.tensors[0], digits.holdout.tensors[0]]).add(1).mul(8).flatten(1)
    original = torch.from_numpy(load_digits().data).float()
    assert torch.equal(both.unique(dim=0), original.unique(dim=0)) and len(both) == len(original)
    assert torch.cdist(digits.train.tensors[0].flatten(1), digits.holdout.tensors[0].flatten(1)).min() > 0.1


def test_digits_split_is_the_same_everywhere_and_draws_nothing_from_the_caller(digits):
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    again = load_dataset("digits")
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()
    assert torch.equal(again.train.tensors[0], digits.train.tensors[0])
    content = digits.holdout.tensors[0].add(1).mul(8).to(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(content).hexdigest() == "a879a433475e3f7add7fd7cd3c04e1849bf620267d344c845843a4487b937ffb"


def test_collect_gives_a_split_in_memory_and_draws_nothing_from_the_caller(digits):
    state = torch.get_rng_state()
    images, labels = collect(digits.holdout)
    assert torch.equal(images, digits.holdout.tensors[0]) and torch.equal(labels, digits.holdout.tensors[1])
    assert torch.equal(state, torch.get_rng_state())


def test_rank_in_class_counts_earlier_entries_of_the_class():
    assert rank_in_class(torch.tensor([2, 0, 2, 2, 0, 1]), 3).tolist() == [0, 0, 1, 2, 1, 0]


@pytest.mark.parametrize("name", ["digit", "Digits", "cifar", ""])
def test_unknown_dataset_names_the_near_ones(name):
    with pytest.raises(ValueError, match=r"unknown dataset .*'digits'"):
        load_dataset(name)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        load_dataset("digits")


def test_import_needs_no_optional_library():
    optional = ["sklearn", "PIL", "matplotlib", "jsonargparse", "yaml"]
    program = f"import sys, models.evaluate; print(sorted(set({optional}) & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_check_labels_accepts_every_class():
    for dtype in (torch.int64, torch.int32, torch.uint8):
        check_labels(torch.arange(10, dtype=dtype), 10)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0, 10]), ValueError, r"\[0, 9\] for 10 classes, got \[10\] \(1 of 2 labels\)"),
        (torch.tensor([-1, 3]), ValueError, r"got \[-1\]"),
        (torch.tensor([], dtype=torch.int64), ValueError, "at least one"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"1-d.*\(2, 2\)"),
        (torch.tensor([1.0]), TypeError, "float32"),
        (torch.tensor([True]), TypeError, "bool"),
        ([1, 2], TypeError, "list"),
    ],
)
def test_check_labels_refuses(labels, error, message):
    with pytest.raises(error, match=message):
        check_labels(labels, 10)


def test_uint8_levels_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)


def test_to_uint8_clamps_rounds_and_moves_channels_last():
    images = torch.tensor([-3.0, -1.0, 0.003, 1.0, 1.5, -0.997]).reshape(1, 3, 1, 2)
    expected = torch.tensor([[0, 128, 255], [0, 255, 0]], dtype=torch.uint8).reshape(1, 1, 2, 3)
    assert torch.equal(to_uint8(images), expected)
    assert torch.equal(to_uint8(images.double()), expected)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(0, 1, 8, 8), ValueError, "at least one image"),
        (torch.zeros(1, 8, 8), ValueError, r"\(1, 8, 8\)"),
        (torch.full((1, 1, 8, 8), float("nan")), ValueError, "NaN"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.int64), TypeError, "int64"),
        (np.zeros((1, 1, 8, 8)), TypeError, "ndarray"),
    ],
)
def test_to_uint8_refuses(images, error, message):
    with pytest.raises(error, match=message):
        to_uint8(images)


def test_from_uint8_turns_repeated_grey_back_and_refuses_colour():
    grey = random_uint8(2)
    assert torch.equal(from_uint8(grey.expand(-1, -1, -1, 3), channels=1), from_uint8(grey))
    with pytest.raises(ValueError, match="in colour"):
        from_uint8(random_uint8(2, channels=3), channels=1)
    with pytest.raises(ValueError, match="must have 3 channels, got 1"):
        from_uint8(grey, channels=3)
    with pytest.raises(TypeError, match="to_uint8"):
        from_uint8(grey.float())


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_round_trip(tmp_path, channels):
    images, labels = random_uint8(5, channels), torch.arange(5)
    save_npz(tmp_path / "samples", images, labels)  # no suffix is added
    loaded, loaded_labels = load_npz(tmp_path / "samples")
    assert torch.equal(loaded, images.expand(-1, -1, -1, 3)) and torch.equal(loaded_labels, labels)
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]
    save_npz(tmp_path / "samples", images)
    assert load_npz(tmp_path / "samples")[1] is None


def test_npz_is_what_the_adm_evaluator_reads(tmp_path):
    images = random_uint8(5)
    save_npz(tmp_path / "samples.npz", images.permute(0, 2, 1, 3))  # not contiguous
    with zipfile.ZipFile(tmp_path / "samples.npz").open("arr_0.npy") as file:
        version = np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        pixels = np.frombuffer(file.read(), dtype).reshape(shape)
    assert (version, shape, fortran, dtype) == ((1, 0), (5, 8, 8, 3), False, np.uint8)
    assert (pixels == images.permute(0, 2, 1, 3).numpy()).all()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, r"key 'arr_0', got \['images'\]"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, "uint8.*float32"),
        ({"arr_0": np.zeros((2, 8, 8), np.uint8)}, r"\(2, 8, 8\)"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"\(2, 3, 8, 8\)"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "at least one image"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.zeros(3, np.int64)}, r"labels must be integers \(2,"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.zeros(2)}, "labels.*float64"),
        ({"arr_0": np.array([{}], dtype=object)}, "plain arrays"),
    ],
)
def test_load_npz_refuses_wrong_contents(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_npz(tmp_path / "bad.npz")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_load_npz_refuses_a_truncated_file(tmp_path, keep):
    path = tmp_path / "samples.npz"
    save_npz(path, random_uint8(20))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(ValueError, match="samples.npz is not a whole npz file"):
        load_npz(path)


def test_load_npz_refuses_flipped_bytes_and_a_plain_npy(tmp_path):
    path = tmp_path / "samples.npz"
    save_npz(path, random_uint8(20))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a whole npz file"):
        load_npz(path)
    np.save(tmp_path / "samples.npy", np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="not a whole npz file"):
        load_npz(tmp_path / "samples.npy")
    with pytest.raises(FileNotFoundError, match="missing.npz"):
        load_npz(tmp_path / "missing.npz")


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (torch.zeros(0, 8, 8, 1, dtype=torch.uint8), None, ValueError, "at least one image"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), None, ValueError, r"\(2, 1, 8, 8\)"),
        (torch.zeros(2, 8, 8, 1), None, TypeError, "to_uint8"),
        (random_uint8(2), torch.zeros(3, dtype=torch.int64), ValueError, r"labels must be \(2,\).*\(3,\)"),
        (random_uint8(2), torch.zeros(2), TypeError, "labels must be a tensor of integers"),
    ],
)
def test_save_npz_refuses(tmp_path, images, labels, error, message):
    with pytest.raises(error, match=message):
        save_npz(tmp_path / "samples.npz", images, labels)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_enlarges_by_whole_pixels_with_gaps(tmp_path, channels):
    from PIL import Image

    images = random_uint8(6, channels)
    save_grid(tmp_path / "grid.png", images, columns=3)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 72 + 8, 3 * 72 + 8, 3)  # 64-pixel tiles, 8-pixel gaps
    assert (grid[:8] == 255).all() and (grid[:, 72:80] == 255).all()
    tile = grid[80:144, 8:72]  # second row, first column
    assert (tile[4::8, 4::8] == images[3].expand(-1, -1, 3).numpy()).all()
    assert (tile == tile[::8, ::8].repeat(8, axis=0).repeat(8, axis=1)).all()


def test_grid_labels_stand_left_and_above(tmp_path):
    from PIL import Image

    save_grid(tmp_path / "plain.png", random_uint8(4), columns=2)
    save_grid(tmp_path / "labelled.png", random_uint8(4), 2, row_labels=["DSMoE", "DiT"], column_labels=["0", "1"])
    plain = np.asarray(Image.open(tmp_path / "plain.png"))
    labelled = np.asarray(Image.open(tmp_path / "labelled.png"))
    top, left = labelled.shape[0] - plain.shape[0], labelled.shape[1] - plain.shape[1]
    assert (labelled[top:, left:] == plain).all()
    assert (labelled[:top, left:] < 128).any() and (labelled[top:, :left] < 128).any()


def test_long_names_of_columns_do_not_overlap(tmp_path):
    from PIL import Image

    names = ["n01440764 tench, Tinca tinca", "b\nc", "W" * 40]  # the name of a folder may hold a line break
    save_grid(tmp_path / "grid.png", random_uint8(3), 3, column_labels=names)
    heading = np.asarray(Image.open(tmp_path / "grid.png"))[: 16 + 8]
    for column in range(3):
        assert (heading[:, 72 * column : 72 * column + 8] == 255).all()
        assert (heading[:, 72 * column + 8 : 72 * column + 72] < 128).any()


@pytest.mark.parametrize(
    ("count", "columns", "labels", "message"),
    [
        (4, 3, {}, "divide the 4 images, got 3"),
        (4, 0, {}, "at least 1"),
        (4, 2, {"row_labels": ["a"]}, "row_labels must have 2 entries"),
        (4, 2, {"column_labels": ["a", "b", "c"]}, "column_labels must have 2 entries"),
    ],
)
def test_grid_refuses(tmp_path, count, columns, labels, message):
    with pytest.raises(ValueError, match=message):
        save_grid(tmp_path / "grid.png", random_uint8(count), columns, **labels)


class OnAGPU:
    """Truth values that nobody may wait for."""

    is_cuda = True

    def all(self) -> str:
        return "all of them"


def test_values_on_a_gpu_are_left_to_the_device(monkeypatch):
    asserted = []
    monkeypatch.setattr(torch, "_assert_async", lambda *args: asserted.append(args))
    check_values(OnAGPU(), "labels must be in [0, 9]", lambda outside: "read on the host")
    assert asserted == [("all of them", "labels must be in [0, 9]")]
