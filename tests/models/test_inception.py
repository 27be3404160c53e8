"""FID's Inception network: held against torch-fidelity's on seeded weights, its resize against TensorFlow's rule."""

import hashlib
import math

import numpy as np
import pytest
import torch

from models.metrics import InceptionFeatures, load_inception
from models.metrics.inception import inception_outputs, resize_as_tensorflow


def seeded_weights(network):
    """Weights that keep activations near 1 through all layers, with batch norms that are no identities."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, value in sorted(network.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        draw = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            state[name] = draw * (2 / value[0].numel()) ** 0.5
        else:
            state[name] = 1 + 0.2 * draw.tanh() if name.endswith(("bn.weight", "bn.running_var")) else 0.1 * draw
    return state


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(seeded_weights(InceptionFeatures()), path)
    return path


@pytest.fixture(scope="module")
def network(weights):
    return load_inception(weights)


def patterns():
    """Two images of 40 x 56."""
    y, x, c = torch.meshgrid(torch.arange(40), torch.arange(56), torch.arange(3), indexing="ij")
    return torch.stack([(y * x + 40 * c) % 256, (3 * y + 5 * x * x + 90 * c) % 256]).to(torch.uint8)


# Of each output: some columns, their values for each image, and the sum of each image's row.
EXPECTED = {
    "features": (
        [0, 2, 1033, 2047],
        [[2.068038, 0.076489, 0.268328, 0.205335], [1.943249, 0.066014, 0.254104, 0.259638]],
        [900.9385, 868.6967],
    ),
    "spatial": (
        [0, 1, 900, 2016],
        [[0.964223, 0.0, 0.211831, 1.102336], [0.992384, 0.0, 0.116051, 1.15078]],
        [582.374, 510.1411],
    ),
    "logits": (
        [0, 1, 2, 1007],
        [[-1.380645, 0.373228, -0.124848, 2.258423], [-1.267056, 0.31487, -0.130719, 2.225407]],
        [39.4682, 40.2175],
    ),
}


@torch.no_grad()
def test_outputs_are_those_of_torch_fidelity(network):
    """Recorded from FeatureExtractorInceptionV3 of torch-fidelity 0.4.0 (torch 2.13, CPU) with `seeded_weights`.

    Its features "2048" and "logits_unbiased", and the first 7 channels of its Mixed_6d.branch1x1, channels last.
    Both networks gave the same bits for these images and for sizes from 1x1 to 513x31.
    """
    outputs = network(patterns())._asdict()
    assert {name: tuple(output.shape) for name, output in outputs.items()} == {
        "features": (2, 2048),
        "spatial": (2, 2023),
        "logits": (2, 1008),
    }
    for name, (columns, values, sums) in EXPECTED.items():
        torch.testing.assert_close(outputs[name][:, columns], torch.tensor(values), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs[name].sum(1), torch.tensor(sums), rtol=1e-5, atol=1e-3)


@pytest.fixture
def precisions():
    """What a process may set of float32 products; set back afterwards."""
    backends = torch.backends
    owners = backends.cudnn.conv, backends.mkldnn.conv
    before = [owner.fp32_precision for owner in owners]
    yield dict(zip(("cudnn", "mkldnn"), owners, strict=True))
    for owner, value in zip(owners, before, strict=True):
        owner.fp32_precision = value


@torch.no_grad()
@pytest.mark.parametrize(("backend", "precision"), [("cudnn", "ieee"), ("cudnn", "tf32"), ("mkldnn", "bf16")])
def test_outputs_are_the_same_whatever_the_process_has_set_of_convolutions(network, precisions, backend, precision):
    expected = network(patterns())
    precisions[backend].fp32_precision = precision
    assert all(map(torch.equal, network(patterns()), expected))
    assert precisions[backend].fp32_precision == precision


def test_keys_and_shapes_are_those_of_the_published_file(network):
    """The digest was made of torch-fidelity 0.4.0's state dict in this way."""
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    lines = sorted(f"{name} {shape}" for name, shape in shapes.items() if not name.endswith("num_batches_tracked"))
    assert len(lines) == 472
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "d84f693f2abd7fea61cb31c87d3b2f268bf707c1bae1db219afdad3363959cb0"
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_850_960
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(("height", "width", "side"), [(5, 7, 11), (13, 8, 5), (1, 2, 9), (6, 6, 6)])
def test_resize_follows_the_rule_pixel_by_pixel(height, width, side):
    image = np.random.default_rng(0).uniform(0, 255, (height, width))
    expected = np.empty((side, side))
    for i in range(side):
        for j in range(side):
            y, x = i * height / side, j * width / side
            top, left = math.floor(y), math.floor(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
            lower = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
            expected[i, j] = upper * (1 - (y - top)) + lower * (y - top)
    resized = resize_as_tensorflow(torch.from_numpy(image).float()[None, None], side)
    np.testing.assert_allclose(resized[0, 0].numpy(), expected, rtol=0, atol=1e-3)


def test_resize_of_a_ramp_keeps_its_origin():
    """Half-pixel centres would begin below 0 and clamp; antialiasing would smooth the ends."""
    ramp = torch.arange(0.0, 600, 2).expand(1, 3, 300, 300)
    resized = resize_as_tensorflow(ramp, 299)
    assert resized[0, 0, 0, 0] == 0
    torch.testing.assert_close(resized[0, 1, 7], torch.arange(299) * (600 / 299), rtol=1e-5, atol=1e-4)


def test_a_file_with_batch_counters_loads_too(weights, network, tmp_path):
    state = torch.load(weights) | {"Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0)}
    torch.save(state, tmp_path / "with.pth")
    assert torch.equal(load_inception(tmp_path / "with.pth").fc.weight, network.fc.weight)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda state: state.pop("Mixed_7c.branch_pool.bn.running_var"),
            "1 keys missing or too many, such as 'Mixed_7c",
        ),
        (lambda state: state.update({"AuxLogits.fc.bias": torch.zeros(1)}), "1 keys .*'AuxLogits.fc.bias'"),
        (lambda state: state.update({"fc.weight": torch.zeros(1000, 2048)}), r"(?s)does not hold FID's.*size mismatch"),
        (lambda state: state.clear(), "472 keys missing"),
    ],
    ids=["missing", "too many", "another network", "empty"],
)
def test_refuses_other_weights(weights, tmp_path, edit, message):
    state = torch.load(weights)
    edit(state)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        load_inception(tmp_path / "other.pth")


def test_refuses_files_that_are_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.pth"):
        load_inception(tmp_path / "missing.pth")
    path = tmp_path / "bad.pth"
    for content in (b"", b"<html>not found</html>"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path} can't be read as a file of weights"):
            load_inception(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="does not hold FID's Inception"):
        load_inception(path)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (
            torch.zeros(2, 8, 8, 3),
            TypeError,
            "uint8 tensor, got torch.float32; convert floats with models.data.to_uint8",
        ),
        (np.zeros((2, 8, 8, 3), np.uint8), TypeError, "got ndarray"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ValueError, r"\(N, H, W, 3\).*\(2, 3, 8, 8\)"),
        (torch.zeros(0, 8, 8, 3, dtype=torch.uint8), ValueError, "at least one image"),
    ],
)
def test_refuses_other_images(images, error, message):
    with torch.device("meta"):
        network = InceptionFeatures()
    with pytest.raises(error, match=message):
        network(images)


def test_batches_of_several_sizes_or_none_are_refused(network):
    small, smaller = torch.zeros(1, 3, 3, 3, dtype=torch.uint8), torch.zeros(1, 3, 2, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"one size, got \(3, 3\) and \(3, 2\)"):
        list(inception_outputs([small, smaller], network))
    with pytest.raises(ValueError, match="at least one image, got none"):
        list(inception_outputs([], network))
