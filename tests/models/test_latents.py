"""The autoencoder around diffusers, latents drawn on the fly and from a folder, and folders that are no latents."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from models.data import load_dataset
from models.data.encoding import encode_folder
from models.data.folder import load_folder
from models.data.latents import Autoencoder, LatentFolder, draw_latents, load_latents, with_autoencoder
from tests.models.conftest import SIZE
from tests.models.helpers import save_vae
from tests.models.runs import one_thread


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


def batch(data):
    return torch.utils.data.default_collate(list(data.train))


def diffusers_vae(name):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(name, low_cpu_mem_usage=False)


@torch.no_grad()
def assert_encodes_and_draws_as(autoencoder, vae, x, shift):
    """Encoded up to rounding: PyTorch multiplies frozen weights otherwise. Drawn from one distribution: bit for bit."""
    distribution = vae.encode(x).latent_dist
    expected = torch.cat([distribution.mean, distribution.std], dim=1)
    moments = autoencoder.moments(x)
    assert moments.shape == expected.shape and moments.dtype == torch.float32
    torch.testing.assert_close(moments, expected)
    torch.manual_seed(5)
    drawn = autoencoder.draw(expected)
    torch.manual_seed(5)
    assert torch.equal(drawn, (distribution.sample() - shift) * autoencoder.scaling_factor)


def test_it_encodes_and_decodes_as_diffusers_does(vae):
    autoencoder, reference = Autoencoder(vae), diffusers_vae(vae)
    assert (autoencoder.channels, autoencoder.downsampling, autoencoder.latent_size(SIZE)) == (3, 2, 8)
    assert autoencoder.scaling_factor == 0.5
    x = torch.rand(4, 3, SIZE, SIZE) * 2 - 1
    assert_encodes_and_draws_as(autoencoder, reference, x, shift=0.25)
    latents = torch.randn(4, 3, 8, 8)
    images = autoencoder.decode(latents)
    assert images.shape == (4, 3, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(images, reference.decode(latents / 0.5 + 0.25).sample)


def test_without_a_shift_latents_are_only_scaled(tmp_path):
    name = save_vae(tmp_path, shift_factor=None, scaling_factor=0.18215)
    autoencoder = Autoencoder(name)
    assert autoencoder.scaling_factor == 0.18215
    assert_encodes_and_draws_as(autoencoder, diffusers_vae(name), torch.rand(2, 3, SIZE, SIZE), shift=0.0)


def test_draw_has_the_mean_and_the_spread_of_the_moments():
    moments = torch.cat([torch.full((1, 2, 100, 100), 3.0), torch.full((1, 2, 100, 100), 0.5)], dim=1)
    drawn = draw_latents(moments, 2.0, 1.0)
    assert drawn.shape == (1, 2, 100, 100)
    assert abs(drawn.mean() - (3 - 1) * 2) < 0.05 and abs(drawn.std() - 0.5 * 2) < 0.05


def test_parts_bound_the_work_and_do_not_change_it(vae, monkeypatch):
    autoencoder, x = Autoencoder(vae), torch.rand(5, 3, SIZE, SIZE)
    whole, encode, sizes = autoencoder.moments(x), autoencoder._vae.encode, []
    monkeypatch.setattr(autoencoder._vae, "encode", lambda part: sizes.append(len(part)) or encode(part))
    monkeypatch.setattr("models.data.latents.PIXELS_AT_ONCE", 2 * SIZE**2)
    torch.testing.assert_close(autoencoder.moments(x), whole)
    monkeypatch.setattr("models.data.latents.PIXELS_AT_ONCE", 1)
    autoencoder.moments(x[:2])
    assert sizes == [2, 2, 1, 1, 1]


def test_decoded_images_do_not_depend_on_their_batch(vae):
    autoencoder, latents = Autoencoder(vae), torch.randn(5, 3, 8, 8)
    parts = [autoencoder.decode(part) for part in latents.split(2)]
    assert torch.equal(autoencoder.decode(latents), torch.cat(parts))


def test_it_is_frozen_in_float32_and_of_no_model(vae, tmp_path):
    model = nn.Linear(2, 2)
    model.autoencoder = Autoencoder(vae)
    assert set(model.state_dict()) == {"weight", "bias"} and len(list(model.parameters())) == 2
    inner = model.autoencoder._vae
    assert not inner.training and not any(p.requires_grad for p in inner.parameters())
    images = torch.rand(1, 3, SIZE, SIZE, requires_grad=True)
    assert not model.autoencoder.moments(images).requires_grad
    half = diffusers_vae(vae).half()
    half.save_pretrained(tmp_path)
    assert {p.dtype for p in Autoencoder(str(tmp_path))._vae.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        low = model.autoencoder.moments(images)
    assert torch.equal(low, model.autoencoder.moments(images))


@pytest.mark.gpu
def test_it_moves_to_what_it_is_given(vae):
    autoencoder, x = Autoencoder(vae), torch.rand(2, 3, SIZE, SIZE)
    on_gpu = autoencoder.moments(x.cuda())
    assert on_gpu.is_cuda and autoencoder.decode(autoencoder.draw(on_gpu)).is_cuda
    torch.testing.assert_close(on_gpu.cpu(), autoencoder.moments(x), rtol=1e-2, atol=1e-2)  # TF32 convolutions


def test_sizes_that_do_not_fit(vae, images, tmp_path):
    with pytest.raises(ValueError, match=r"image_size must be a multiple of 2, .*got 15"):
        load_dataset(str(images), image_size=15, autoencoder=vae)
    with pytest.raises(ValueError, match=r"image_size must be a multiple of 2, .*got 15"):
        encode_folder(images, vae, tmp_path / "latents", image_size=15)
    assert not (tmp_path / "latents").exists()


def test_a_name_that_is_neither_a_folder_nor_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/no-such-vae", str(tmp_path / "nowhere"), str(tmp_path)):
        with pytest.raises(ValueError, match=r"neither a folder .* nor a name on the Hugging Face hub") as caught:
            Autoencoder(name)
        assert "\n" not in str(caught.value) and repr(name) in str(caught.value)


def test_an_autoencoder_that_lacks_weights_is_refused(vae, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes(Path(vae, "config.json").read_bytes())
    weights = load_file(f"{vae}/diffusion_pytorch_model.safetensors")
    del weights["encoder.conv_in.bias"]
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 weights, such as 'encoder.conv_in.bias'"):
        Autoencoder(str(tmp_path))
    content = (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="neither a folder"):
        Autoencoder(str(tmp_path))


def test_an_autoencoder_of_other_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be of RGB images, it takes 1 channels and gives 1"):
        Autoencoder(save_vae(tmp_path, in_channels=1, out_channels=1))


def test_without_diffusers_it_says_what_to_install(vae, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="pip install diffusers"):
        Autoencoder(vae)


def test_latents_on_the_fly(images, vae):
    plain = load_dataset(str(images), image_size=SIZE, flip=False)
    data = load_dataset(str(images), image_size=SIZE, flip=False, autoencoder=vae)
    assert (data.image_size, data.channels, data.num_classes, data.autoencoder) == (8, 3, 2, vae)
    assert data.class_names == ("a", "b") and data.holdout is None and data.train is not None
    items, labels = batch(data)
    assert items.dtype == torch.uint8 and labels.tolist() == [0, 0, 0, 1, 1]
    autoencoder = Autoencoder(vae)
    torch.manual_seed(2)
    expected = autoencoder.draw(autoencoder.moments(plain.draw(items)))
    torch.manual_seed(2)
    assert torch.equal(data.draw(items), expected)


@pytest.mark.parametrize("flip", [True, False])
def test_cached_latents_are_those_of_the_fly(images, latents, vae, flip):
    fly = load_dataset(str(images), image_size=SIZE, flip=flip, autoencoder=vae)
    cached = load_dataset(str(latents), flip=flip)
    for name in ("image_size", "channels", "num_classes", "class_names", "autoencoder", "holdout"):
        assert getattr(fly, name) == getattr(cached, name), name
    (fly_items, fly_labels), (cached_items, cached_labels) = batch(fly), batch(cached)
    assert torch.equal(fly_labels, cached_labels)
    assert cached_items.shape == (5, 2, 6, 8, 8) and cached_items.dtype == torch.float32
    drawn = []
    for seed in range(4):
        torch.manual_seed(seed)
        drawn.append(fly.draw(fly_items))
        torch.manual_seed(seed)
        torch.testing.assert_close(cached.draw(cached_items), drawn[-1])
    assert not torch.allclose(drawn[0], drawn[1])


def test_the_views_are_an_image_and_its_mirror_image(images, latents, vae):
    items, _ = batch(load_latents(latents))
    pixels, _ = batch(load_folder(images, image_size=SIZE))
    pixels = pixels / 127.5 - 1
    autoencoder = Autoencoder(vae)
    torch.testing.assert_close(items[:, 0], autoencoder.moments(pixels))
    torch.testing.assert_close(items[:, 1], autoencoder.moments(pixels.flip(-1)))
    assert not torch.allclose(items[:, 0], items[:, 1])


def test_latents_without_mirror_images_are_not_flipped(images, vae, tmp_path):
    encode_folder(images, vae, tmp_path, image_size=SIZE, flip=False)  # into an empty folder that exists
    data = load_latents(tmp_path, flip=True)
    items, _ = batch(data)
    assert items.shape == (5, 1, 6, 8, 8)
    torch.manual_seed(2)
    drawn = data.draw(items)
    torch.manual_seed(2)
    assert torch.equal(drawn, draw_latents(items[:, 0], 0.5, 0.25))


def test_files_are_plain_arrays_and_json(latents):
    assert sorted(path.name for path in latents.iterdir()) == ["labels.npy", "latents.json", "moments.npy"]
    assert np.load(latents / "moments.npy").shape == (5, 2, 6, 8, 8)
    assert np.load(latents / "labels.npy").tolist() == [0, 0, 0, 1, 1]
    index = json.loads((latents / "latents.json").read_text())
    assert index["format"] == 1 and index["image_size"] == SIZE and index["class_names"] == ["a", "b"]


def test_latents_need_no_diffusers(latents, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    data = load_latents(latents)
    assert data.draw(batch(data)[0]).shape == (5, 3, 8, 8)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loading_processes_map_the_file_themselves(latents, method):
    data = load_latents(latents)
    assert isinstance(data.train, LatentFolder)
    items, labels = batch(data)  # so that this process has mapped it
    assert len(pickle.dumps(data.train)) < 1000 < (latents / "moments.npy").stat().st_size
    loader = DataLoader(data.train, 2, num_workers=1, multiprocessing_context=method)
    loaded = list(loader)
    assert torch.equal(torch.cat([x for x, _ in loaded]), items)
    assert torch.equal(torch.cat([y for _, y in loaded]), labels)


def cut_moments(path):
    content = (path / "moments.npy").read_bytes()
    (path / "moments.npy").write_bytes(content[:-100])


def edit_index(path, **changes):
    index = json.loads((path / "latents.json").read_text())
    (path / "latents.json").write_text(json.dumps({**index, **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "latents.json").unlink(), r"holds no latents.json, .*half-written.*models.encode"),
        (lambda p: (p / "latents.json").write_text("{"), r"latents.json is damaged"),
        (lambda p: (p / "latents.json").write_text("[]"), r"latents.json is damaged"),
        (
            lambda p: (p / "latents.json").write_text('{"format": 1}'),
            r"latents.json is damaged .*'autoencoder'.*missing",
        ),
        (lambda p: edit_index(p, format=2), r"latents.json is of format 2, expected 1: encode the images again"),
        (lambda p: edit_index(p, moments_shape=[6, 2, 6, 8, 8]), r"moments.npy is damaged .*\(6, 2, .*\(5, 2, "),
        (lambda p: edit_index(p, class_names=["a"]), r"labels.npy is damaged .*\[0, 1\)"),
        (cut_moments, r"moments.npy is damaged or incomplete"),
        (lambda p: (p / "moments.npy").write_bytes(b""), r"moments.npy is damaged"),
        (lambda p: (p / "moments.npy").unlink(), r"moments.npy is damaged or incomplete"),
        (lambda p: np.save(p / "moments.npy", np.zeros((5, 2, 6, 8, 8))), r"moments.npy .*float32 .*got float64"),
        (lambda p: (p / "labels.npy").unlink(), r"labels.npy is damaged or incomplete"),
        (lambda p: np.save(p / "labels.npy", np.arange(4)), r"labels.npy is damaged .*\(5,\)"),
        (lambda p: np.save(p / "labels.npy", -np.arange(5)), r"labels.npy is damaged"),
    ],
)
def test_damaged_folders_are_refused(latents, damage, message):
    damage(latents)
    with pytest.raises(ValueError, match=message):
        load_dataset(str(latents))


def test_the_autoencoder_must_be_that_of_the_latents(latents, vae, images, tmp_path, monkeypatch):
    monkeypatch.chdir(vae)
    assert load_dataset(str(latents), autoencoder=".").autoencoder == vae
    with pytest.raises(ValueError, match=r"autoencoder is 'other/vae', but .*latents was encoded by .*leave it out"):
        load_dataset(str(latents), autoencoder="other/vae")
    with pytest.raises(ValueError, match=r"autoencoder must be left out for 'digits'.*got 'other/vae'"):
        load_dataset("digits", autoencoder="other/vae")
    with pytest.raises(ValueError, match="must be a folder of RGB images"):
        with_autoencoder(load_latents(latents), vae)
