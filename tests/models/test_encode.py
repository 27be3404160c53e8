"""The command that encodes a folder of images: what it writes, refuses, and leaves to go on from."""

import json
import shutil
from contextlib import closing

import pytest

from models import encode as command
from models.data import load_dataset
from models.data.encoding import ENCODED, encode_folder
from models.data.latents import Autoencoder, load_latents
from models.files import FileLock
from tests.models.conftest import SIZE
from tests.models.helpers import save_vae
from tests.models.runs import one_thread


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


def arguments(images, vae, output, *more):
    return ["--data", str(images), "--autoencoder", vae, "--output", str(output), "--image-size", str(SIZE), *more]


def test_the_command_writes_latents(images, vae, tmp_path, capsys):
    output = tmp_path / "new" / "latents"
    more = ("--batch-size", "3", "--workers", "1", "--device", "cpu", "--no-flip")
    assert command.main(arguments(images, vae, output, *more)) == 0
    printed = capsys.readouterr()
    assert f"5 images: {output}" in printed.out and "encode" in printed.err
    data = load_latents(output)
    assert len(data.train) == 5 and data.train[0][0].shape == (1, 6, 8, 8)


def test_the_command_refuses_an_output_in_use(images, vae, latents, tmp_path, capsys):
    before = {path: path.read_bytes() for path in latents.iterdir()}
    assert command.main(arguments(images, vae, latents)) == 2
    assert "output must be a new or an empty folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in latents.iterdir()} == before
    (tmp_path / "file").touch()
    assert command.main(arguments(images, vae, tmp_path / "file")) == 2


@pytest.mark.parametrize("option", ["--data", "--autoencoder", "--output", "--batch-size", "--workers", "--image-size"])
def test_the_command_names_a_bad_option(images, vae, tmp_path, capsys, option):
    value = {"--workers": "-1", "--batch-size": "0", "--image-size": "0"}.get(option, "")
    assert command.main(arguments(images, vae, tmp_path / "out", option, value)) == 2
    assert f"correct {option}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


FILES = ["labels.npy", "latents.json", "moments.npy"]


def stop_at(monkeypatch, call, error):
    """The autoencoder raises an error when it is called so often; returns how many images it was called with."""
    moments, calls = Autoencoder.moments, []

    def stopping(self, batch):
        calls.append(len(batch))
        if len(calls) == call:
            raise error
        return moments(self, batch)

    monkeypatch.setattr(Autoencoder, "moments", stopping)
    return calls


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (OSError("No space left on device"), 2)])
def test_a_stopped_command_goes_on_where_it_was(images, vae, latents, tmp_path, monkeypatch, capsys, error, status):
    output = tmp_path / "out"
    words = arguments(images, vae, output, "--batch-size", "2")
    with monkeypatch.context() as context:
        stop_at(context, 3, error)  # an image and its mirror image are a call each
        assert command.main(words) == status
    assert "2 images are encoded: the same command goes on after them" in capsys.readouterr().err
    with pytest.raises(ValueError, match="half-written"):
        load_dataset(str(output))
    with (output / "moments.npy").open("ab") as file, (output / ENCODED).open("a") as encoded:
        file.write(b"part of a row")  # as a killed process leaves it
        encoded.write('["b/')
    calls = stop_at(monkeypatch, None, None)
    assert command.main(words) == 0
    assert calls == [2, 2, 1, 1], "what was there was not encoded again"
    assert sorted(path.name for path in output.iterdir()) == FILES
    for name in FILES:
        assert (output / name).read_bytes() == (latents / name).read_bytes()


def test_a_command_stopped_in_its_first_batch_leaves_nothing(images, vae, tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, 2, KeyboardInterrupt())
    assert command.main(arguments(images, vae, tmp_path / "out", "--batch-size", "2")) == 130
    assert list((tmp_path / "out").iterdir()) == [] and "encoded" not in capsys.readouterr().err


def test_it_goes_on_in_whole_batches(images, vae, latents, tmp_path, monkeypatch):
    """Of another size too: what is there is cut to it, so that the bits are those of one call."""
    words = arguments(images, vae, tmp_path / "out", "--no-flip", "--batch-size")
    with monkeypatch.context() as context:
        stop_at(context, 4, KeyboardInterrupt())
        assert command.main([*words, "1"]) == 130
    calls = stop_at(monkeypatch, None, None)
    assert command.main([*words, "2"]) == 0 and calls == [2, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--no-flip"], "out was begun with flip True, got False: keep that to go on, or empty the folder"),
        (["--image-size", "32"], "out was begun with image_size 16, got 32"),
    ],
)
def test_other_settings_do_not_go_on(images, vae, tmp_path, monkeypatch, capsys, words, message):
    before = arguments(images, vae, tmp_path / "out", "--batch-size", "2")
    with monkeypatch.context() as context:
        stop_at(context, 3, KeyboardInterrupt())
        assert command.main(before) == 130
    files = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert command.main([*before, *words]) == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
    with closing(FileLock(tmp_path / "out" / "moments.npy", "")):
        assert command.main(before) == 2
    assert "another process encodes into" in capsys.readouterr().err
    assert command.main(before) == 0


def test_a_bad_image_is_named_and_may_be_removed(images, vae, tmp_path, capsys):
    copy, output = tmp_path / "images", tmp_path / "out"
    shutil.copytree(images, copy)
    (copy / "b" / "0.png").write_text("hello")
    words = arguments(copy, vae, output, "--batch-size", "1")
    assert command.main(words) == 2
    told = capsys.readouterr().err
    assert "b/0.png can't be read" in told and "3 images are encoded: the same command goes on" in told
    assert f"{output}: needs 0.0 GB, " in told
    (copy / "a" / "2.png").rename(copy / "a" / "3.png")
    assert command.main(words) == 2
    assert "out was begun with other images: a/2.png was number 2." in capsys.readouterr().err
    (copy / "a" / "3.png").rename(copy / "a" / "2.png")
    (copy / "b" / "0.png").unlink()
    assert command.main(words) == 0
    encode_folder(copy, vae, tmp_path / "straight", image_size=SIZE, batch_size=1)
    for name in FILES:
        assert (output / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert json.loads((output / "latents.json").read_text())["moments_shape"][0] == 4


def test_a_killed_command_leaves_a_folder_that_is_named_half_written(tmp_path):
    (tmp_path / "moments.npy").touch()
    with pytest.raises(ValueError, match="half-written"):
        load_dataset(str(tmp_path))


def test_an_unreadable_image_stops_the_encoding(vae, tmp_path, capsys):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "broken.png").write_text("hello")
    assert command.main(arguments(tmp_path / "images", vae, tmp_path / "out")) == 2
    assert "broken.png can't be read" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_an_autoencoder_that_gives_nan_is_refused(images, tmp_path):
    from diffusers import AutoencoderKL

    broken = AutoencoderKL.from_pretrained(save_vae(tmp_path / "vae"), low_cpu_mem_usage=False)
    broken.encoder.conv_in.bias.data.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="gives NaN or infinity"):
        encode_folder(images, str(tmp_path / "vae"), tmp_path / "out", image_size=SIZE)
    assert list((tmp_path / "out").iterdir()) == []
