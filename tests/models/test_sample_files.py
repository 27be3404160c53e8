"""Files of samples read as a stream, joined, and put together from the parts of a run."""

import struct
import zipfile

import numpy as np
import pytest
import torch

from models.data import image_shape, iterate_images, join_npz, load_npz, load_samples, sample_files, save_npz
from models.data.npz import load_origin


def images(count, size=4, seed=0):
    return torch.randint(0, 256, (count, size, size, 3), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def save_parts(folder, pixels, *sizes, first=0, **request):
    """Parts as `models.sample` names them; labels count from 0."""
    for part in pixels.split(list(sizes)):
        labels = torch.arange(first, first + len(part))
        save_npz(folder / f"samples-{first:06d}.npz", part, labels, origin={"first": first, "request": request})
        first += len(part)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 100])
@pytest.mark.parametrize("sizes", [(10,), (4, 6), (1, 1, 8)])
def test_batches_run_across_the_ends_of_files(tmp_path, sizes, batch_size):
    save_parts(tmp_path, images(10), *sizes)
    batches = list(iterate_images(sample_files(tmp_path), batch_size))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert torch.equal(torch.cat(batches), images(10)) and len(batches) == -(-10 // batch_size)


def test_a_stream_reads_what_others_wrote(tmp_path):
    """Compressed, of the npy format's second version, and with the statistics of a reference batch beside it."""
    np.savez_compressed(tmp_path / "packed.npz", mu=np.zeros(3), arr_0=images(5).numpy())
    with zipfile.ZipFile(tmp_path / "second.npz", "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array(member, images(5).numpy(), version=(2, 0))
    for name in ("packed.npz", "second.npz"):
        assert image_shape(tmp_path / name) == (5, 4, 4, 3)
        assert torch.equal(torch.cat(list(iterate_images([tmp_path / name], 2))), images(5))


def test_origin_comes_back_and_is_optional(tmp_path):
    origin = {"first": 3, "request": {"seed": 0, "steps": None, "cfg_scale": 0.1}}
    save_npz(tmp_path / "with.npz", images(2), origin=origin)
    save_npz(tmp_path / "without.npz", images(2))
    assert load_origin(tmp_path / "with.npz") == origin and load_origin(tmp_path / "without.npz") is None
    assert torch.equal(load_npz(tmp_path / "with.npz")[0], images(2))


@pytest.mark.parametrize("keep", [0.3, 0.99])
def test_a_truncated_file_is_refused(tmp_path, keep):
    save_npz(tmp_path / "samples.npz", images(20))
    content = (tmp_path / "samples.npz").read_bytes()
    (tmp_path / "samples.npz").write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match="samples.npz is not a whole npz file"):
        list(iterate_images([tmp_path / "samples.npz"], 8))


def test_a_flipped_bit_is_found_at_the_end(tmp_path):
    save_npz(tmp_path / "samples.npz", images(20))
    content = bytearray((tmp_path / "samples.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "samples.npz").write_bytes(content)
    with pytest.raises(ValueError, match="Bad CRC-32"):
        list(iterate_images([tmp_path / "samples.npz"], 8))


@pytest.mark.parametrize("count", [4, 6])
def test_more_or_fewer_bytes_than_the_header_says(tmp_path, count):
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive, archive.open("arr_0.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, 4, 4, 3)}
        np.lib.format.write_array_header_1_0(member, header)
        member.write(images(5).numpy().tobytes())
    with pytest.raises(ValueError, match="more or fewer bytes than its header says"):
        list(iterate_images([tmp_path / "bad.npz"], 2))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4, 4, 3)), "must be uint8.*float64"),
        (np.zeros((2, 4, 4), np.uint8), r"\(2, 4, 4\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), "at least one image"),
        (np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8)), "last axis outermost"),
        (np.array([{}], dtype=object), "Python objects"),
    ],
)
def test_other_arrays_are_refused_by_their_header(tmp_path, array, message):
    np.savez(tmp_path / "bad.npz", arr_0=array)
    with pytest.raises(ValueError, match=message):
        image_shape(tmp_path / "bad.npz")


def test_no_images_and_a_strange_version_are_refused(tmp_path):
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match=r"expected the key 'arr_0', got \['mu'\]"):
        next(iterate_images([tmp_path / "bad.npz"], 2))
    with zipfile.ZipFile(tmp_path / "new.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x07\x00" + struct.pack("<H", 4) + b"{}  ")
    with pytest.raises(ValueError, match=r"version \(7, 0\)"):
        image_shape(tmp_path / "new.npz")


def test_joined_parts_are_the_file_of_one_call(tmp_path):
    save_parts(tmp_path, images(10), 4, 6)
    join_npz(sample_files(tmp_path), tmp_path / "all.npz")
    pixels, labels = load_npz(tmp_path / "all.npz")
    assert torch.equal(pixels, images(10)) and torch.equal(labels, torch.arange(10))
    save_npz(tmp_path / "unlabelled.npz", images(2))
    join_npz([tmp_path / "unlabelled.npz", tmp_path / "all.npz"], tmp_path / "more.npz")
    pixels, labels = load_npz(tmp_path / "more.npz")
    assert torch.equal(pixels, torch.cat([images(2), images(10)])) and labels is None
    save_npz(tmp_path / "larger.npz", images(2, size=5))
    with pytest.raises(ValueError, match=r"larger.npz holds images of \(5, 5, 3\), but .*all.npz of \(4, 4, 3\)"):
        join_npz([tmp_path / "all.npz", tmp_path / "larger.npz"], tmp_path / "bad.npz")
    assert not (tmp_path / "bad.npz").exists()


def test_a_folder_stands_for_its_file_or_its_parts(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    save_npz(whole / "samples.npz", images(3), torch.arange(3))
    assert sample_files(whole) == [whole / "samples.npz"] == sample_files(whole / "samples.npz")
    save_parts(parts, images(6), 2, 4)
    assert [path.name for path in sample_files(parts)] == ["samples-000000.npz", "samples-000002.npz"]
    pixels, labels = load_samples(parts)
    assert torch.equal(pixels, images(6)) and torch.equal(labels, torch.arange(6))


def test_parts_are_in_the_order_of_their_images_not_of_their_names(tmp_path):
    """Names past a million have seven digits and sort before some of six."""
    save_parts(tmp_path, images(4), 2, 2)
    (tmp_path / "samples-000000.npz").rename(tmp_path / "samples-900000.npz")
    (tmp_path / "samples-000002.npz").rename(tmp_path / "samples-1000000.npz")
    assert torch.equal(torch.cat(list(iterate_images(sample_files(tmp_path), 3))), images(4))


def test_folders_that_are_no_whole_run_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no samples.npz, nor parts such as samples-000000.npz"):
        sample_files(tmp_path)
    save_parts(tmp_path, images(6), 2, 2, 2, seed=0)
    (tmp_path / "samples-000002.npz").rename(tmp_path / "kept")
    with pytest.raises(ValueError, match="image 2 is missing, samples-000004.npz begins with image 4"):
        sample_files(tmp_path)
    save_parts(tmp_path, images(3), 3, first=2, seed=0)
    with pytest.raises(ValueError, match="image 4 is there twice, samples-000004.npz begins with image 4"):
        sample_files(tmp_path)
    save_parts(tmp_path, images(2), 2, first=2, seed=1)
    with pytest.raises(
        ValueError, match="samples-000002.npz was sampled with seed 1, but samples-000000.npz was with 0"
    ):
        sample_files(tmp_path)
    save_npz(tmp_path / "samples-000002.npz", images(2))
    with pytest.raises(ValueError, match="samples-000002.npz does not tell which part of a run it is"):
        sample_files(tmp_path)
    save_npz(tmp_path / "samples.npz", images(2))
    with pytest.raises(ValueError, match="holds samples.npz and parts such as samples-000000.npz"):
        sample_files(tmp_path)
