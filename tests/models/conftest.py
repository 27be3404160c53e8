"""An autoencoder, a folder of images and its latents, as small as they come."""

import numpy as np
import pytest

SIZE = 16


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    from tests.models.helpers import save_vae  # not above: `pytest tests/models` reads this file first

    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of three and two images."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name in ("a/0", "a/1", "a/2", "b/0", "b/1"):
        path = root / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture
def latents(images, vae, tmp_path):
    from models.data.encoding import encode_folder

    encode_folder(images, vae, tmp_path / "latents", image_size=SIZE, batch_size=2)
    return tmp_path / "latents"
