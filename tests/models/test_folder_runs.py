"""Training, resuming and sampling on image folders, on latents made at each step, and on latents from files."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.checkpoint import build_official, official_state_dict
from models.data import load_dataset
from models.encode import main as encode_main
from models.evaluate import main as evaluate_main
from models.sample import main as sample_main
from models.train import main as train_main
from models.training.config import TrainConfig
from models.training.loading import load_trained
from models.training.trainer import Trainer
from tests.models.helpers import save_vae
from tests.models.runs import command_line, one_thread
from tests.models.test_resume import assert_same, newest

JIT = {"depth": 2, "hidden_size": 16, "num_heads": 2, "context_start": 1, "patch_size": 8}
DIT = {"depth": 2, "hidden_size": 16, "num_heads": 2, "learn_sigma": True}
QUICK = {"batch_size": 6, "warmup_steps": 1, "sample_rows": 1, "sample_steps": 2, "image_size": 16, "log_every": 1}


@pytest.fixture(autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes of four images, grey on the left and coloured on the right."""
    from PIL import Image

    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("apple", "bird", "cat"):
        (root / name).mkdir()
        for i in range(4):
            pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            pixels[:, :12] = pixels[:, :12, :1]
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def latents(images, vae, tmp_path_factory):
    output = tmp_path_factory.mktemp("encoded") / "latents"
    words = ["--data", str(images), "--autoencoder", vae, "--output", str(output), "--image-size", "16"]
    assert encode_main(words) == 0
    return output


def config(kind, output, request, **options) -> TrainConfig:
    """JiT on pixels, DiT on latents made at each step by DDPM, or DiT on latents from files."""
    if kind == "pixels":
        options |= {"model": "JiT-digits", "model_options": JIT, "data": str(request.getfixturevalue("images"))}
    elif kind == "on the fly":
        options |= {"model": "DiT-digits", "model_options": DIT, "data": str(request.getfixturevalue("images"))}
        options |= {"autoencoder": request.getfixturevalue("vae"), "objective": "ddpm"}
    else:
        options |= {"model": "DiT-digits", "model_options": DIT, "data": str(request.getfixturevalue("latents"))}
        options |= {"image_size": None}
    return TrainConfig(output=str(output), **{**QUICK, **options})


KINDS = ["pixels", "on the fly", "files"]


@pytest.mark.parametrize("kind", KINDS)
def test_commands_train_and_sample(kind, tmp_path, request, capsys):
    run, output = tmp_path / "run", tmp_path / "samples"
    assert train_main(command_line(config(kind, run, request, steps=3))) == 0
    assert (run / "samples" / "step-00000003.png").exists()
    trained = load_trained(run)
    size, channels = (16, 3) if kind == "pixels" else (8, 3)
    assert trained.model.input_size == size and trained.model.in_channels == channels
    assert trained.model.num_classes == 3 and (trained.autoencoder is None) == (kind == "pixels")
    words = ["--checkpoint", str(run), "--output", str(output), "--num-samples", "6", "--steps", "2"]
    assert sample_main(words) == 0
    with np.load(output / "samples.npz") as archive:
        assert archive["arr_0"].shape == (6, 16, 16, 3) and archive["labels"].tolist() == [0, 1, 2] * 2

    data = load_dataset(str(request.getfixturevalue("images")))
    assert evaluate_main(["--samples", str(output / "samples.npz"), "--data", data.name]) == 2
    assert "holds no images out that samples could be scored against" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_four_steps_equal_two_and_two_bit_for_bit(kind, workers, tmp_path, request):
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    Trainer(config(kind, straight, request, steps=4, workers=workers, ema_decay2=0.5)).fit()
    Trainer(config(kind, parts, request, steps=2, sample_every=1, ema_decay2=0.5)).fit()
    torch.manual_seed(999)
    Trainer(config(kind, parts, request, steps=4, ema_decay2=0.5), resume=True).fit()
    assert_same(newest(straight), newest(parts))


def test_a_folder_may_move(images, tmp_path, request):
    copy, run = tmp_path / "copy", tmp_path / "run"
    Trainer(config("pixels", run, request, steps=1)).fit()
    shutil.copytree(images, copy)
    moved = replace(config("pixels", run, request, steps=2), data=str(copy))
    with pytest.warns(UserWarning, match="resumed, but not bit for bit: data .*copy"):
        trainer = Trainer(moved, resume=True)
    assert trainer.fit().step == 2
    assert Trainer(replace(moved, steps=3), resume=True).fit().step == 3  # from then on it is its folder


def test_a_folder_with_other_classes_is_not_resumed(images, tmp_path, request):
    copy, run = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(images, copy)
    Trainer(config("pixels", run, request, steps=1)).save()
    (copy / "cat").rename(copy / "aardvark")
    moved = config("pixels", run, request, steps=2)
    with pytest.raises(ValueError, match=r"has other classes than .*\['aardvark', 'cat'\].*start a new run"):
        Trainer(replace(moved, data=str(copy)), resume=True)
    (images / "cat").rename(images / "aardvark")
    try:
        with pytest.raises(ValueError, match=r"has other classes than .*\['aardvark', 'cat'\].*start a new run"):
            Trainer(moved, resume=True)
    finally:
        (images / "aardvark").rename(images / "cat")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_the_run_by_its_name(images, tmp_path, capsys, request, workers):
    copy, run = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(images, copy)
    (copy / "bird" / "2.png").write_bytes(b"no image")
    options = {**config("pixels", run, request, steps=4, workers=workers).__dict__, "data": str(copy)}
    assert train_main(command_line(TrainConfig(**options))) == 1
    assert "bird/2.png can't be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "missing/folder"}, "missing/folder does not exist"),
        ({"data": "digits", "image_size": None, "autoencoder": "x"}, "autoencoder must be left out for 'digits'"),
        ({"data": "digits"}, "image_size must be left out for 'digits', which has its own, got 16"),
        ({"image_size": 15}, "input_size: expected a multiple of patch_size = 8, got 15"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"model_options": {**JIT, "num_classes": 5}}, "has 3: leave num_classes out"),
        ({"model_options": {**JIT, "context_start": 2}}, "context_start: expected a block, 0 to 1, got 2"),
    ],
)
def test_refused_on_the_command_line(tmp_path, request, capsys, change, message):
    options = config("pixels", tmp_path / "run", request).__dict__
    with pytest.raises(ValueError, match=message):
        Trainer(TrainConfig(**{**options, **change}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["on the fly", "files"])
def test_another_autoencoder_may_decode(kind, tmp_path, request, capsys):
    run, output = tmp_path / "run", tmp_path / "samples"
    Trainer(config(kind, run, request, steps=1)).save()
    words = ["--checkpoint", str(run), "--output", str(output), "--num-samples", "3", "--steps", "2"]
    other, wrong = (save_vae(tmp_path / str(n), latent_channels=n) for n in (3, 2))
    assert sample_main([*words, "--autoencoder", other]) == 0
    capsys.readouterr()
    assert sample_main([*words, "--autoencoder", wrong]) == 2
    assert "has latents of 2 channels, but the model makes 3" in capsys.readouterr().err


def test_latents_without_a_decoder_are_not_sampled(tmp_path, capsys):
    yaml_file = tmp_path / "model.yaml"
    params = {"input_size": 8, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    yaml_file.write_text(str({"target": "models.models_DiT.DiT", "params": params}))
    torch.save(official_state_dict(build_official("models.models_DiT.DiT", params)), tmp_path / "model.pt")
    words = ["--official", str(yaml_file), "--checkpoint", str(tmp_path / "model.pt"), "--output", str(tmp_path / "o")]
    assert sample_main(words) == 2
    assert "latents of 4 channels, which need a decoder: pass --autoencoder" in capsys.readouterr().err
    vae = save_vae(tmp_path / "vae", latent_channels=4)
    words += ["--autoencoder", vae, "--num-samples", "3", "--objective", "ddpm", "--method", "ddim", "--steps", "2"]
    assert sample_main(words) == 0
    with np.load(tmp_path / "o" / "samples.npz") as archive:
        assert archive["arr_0"].shape == (3, 16, 16, 3)


def test_encoded_images_have_their_size(tmp_path, request):
    with pytest.raises(ValueError, match="image_size must be left out for .*latents, whose images are encoded, got 32"):
        Trainer(TrainConfig(**{**config("files", tmp_path / "run", request).__dict__, "image_size": 32}))


def test_a_grid_of_many_classes_stays_readable(tmp_path, request):
    from PIL import Image

    official, weights = tmp_path / "model.yaml", tmp_path / "model.pt"
    params = {"input_size": 8, "in_channels": 3, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 40}
    official.write_text(str({"target": "models.models_DiT.DiT", "params": params}))
    torch.save(official_state_dict(build_official("models.models_DiT.DiT", params)), weights)
    words = ["--official", str(official), "--checkpoint", str(weights), "--output", str(tmp_path / "out")]
    assert sample_main([*words, "--num-samples", "120", "--steps", "1"]) == 0
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert max(grid.size) < 1000
