"""The Inception network of FID: TensorFlow's of 2015-12-05, under the key names of torch-fidelity's weights file."""

import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 2048
SPATIAL_CHANNELS, SPATIAL_SIDE = 7, 17
SPATIAL_FEATURES = SPATIAL_CHANNELS * SPATIAL_SIDE**2  # 2023, about as many as the pool has
CLASSES = 1008  # of the training set's labels; 1,000 are in use
INPUT_SIDE = 299

Kernel = int | tuple[int, int]
Pool = Literal["average", "max", "max by 2"]


class InceptionOutput(NamedTuple):
    """What scores are computed from, float32.

    features: (N, 2048) pool features, TensorFlow's `pool_3`: FID, KID.
    spatial: (N, 2023) the first 7 channels of `mixed_6/conv` (17 x 17), channels last as TensorFlow has them: sFID.
    logits: (N, 1008) without the bias of the last layer, as ADM and torch-fidelity take them: Inception Score.
    """

    features: Tensor
    spatial: Tensor
    logits: Tensor


class InceptionFeatures(nn.Module):
    """Inception v3 as TensorFlow published it on 2015-12-05, the network that FID is defined by.

    It differs from later Inceptions in its pooling: averages count no padding, and the last block takes maxima.

    Source: C. Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (2015); the network of
    M. Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (2017).
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3, padding=0)
        self.Mixed_5b = _mixed_35(192, pooled=32)
        self.Mixed_5c = _mixed_35(256, pooled=64)
        self.Mixed_5d = _mixed_35(288, pooled=64)
        self.Mixed_6a = _Mixed(288, {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}, "max by 2")
        self.Mixed_6b = _mixed_17(128)
        self.Mixed_6c = _mixed_17(160)
        self.Mixed_6d = _mixed_17(160)
        self.Mixed_6e = _mixed_17(192)
        branches = {
            "branch3x3": [(192, 1), (320, 3)],
            "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)],
        }
        self.Mixed_7a = _Mixed(768, branches, "max by 2")
        self.Mixed_7b = _mixed_8(1280, "average")
        self.Mixed_7c = _mixed_8(2048, "max")
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> InceptionOutput:
        """Images (N, H, W, 3) uint8 of any size, on the network's device -> see `InceptionOutput`.

        Convolutions are IEEE float32 whatever TF32 setting the process has, and give the same bits every run.

        Raises:
            TypeError: images that are not uint8.
            ValueError: another shape, or no image.
        """
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be a uint8 tensor, got {kind}; convert floats with models.data.to_uint8")
        if images.ndim != 4 or images.shape[-1] != 3 or images.numel() == 0:
            raise ValueError(f"images must be (N, H, W, 3) with at least one image, got shape {tuple(images.shape)}")
        x = resize_as_tensorflow(images.permute(0, 3, 1, 2).float(), INPUT_SIDE)  # (N, 3, 299, 299)
        with _exact_convolutions():
            return self._forward((x - 128) / 128)

    def _forward(self, x: Tensor) -> InceptionOutput:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)  # (N, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)  # (N, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (N, 768, 17, 17)
        spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (N, 2048, 8, 8)
        features = x.mean((2, 3))
        return InceptionOutput(features, spatial, features @ self.fc.weight.T)


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """IEEE float32 and the same bits every run.

    `torch.backends.cudnn.flags` raises where a process has one TF32 setting for convolutions and another for all. What
    convolutions took from the latter is their own setting afterwards.
    """
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    settings = [(cudnn.conv, "fp32_precision", "ieee"), (mkldnn.conv, "fp32_precision", "ieee")]
    settings += [(cudnn, "enabled", True), (cudnn, "benchmark", False), (cudnn, "deterministic", True)]
    before = [getattr(owner, name) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(settings, before, strict=True):
            setattr(owner, name, value)


@torch.no_grad()
def inception_outputs(batches: Iterable[Tensor], inception: InceptionFeatures) -> Iterator[InceptionOutput]:
    """The network's output of each batch of images, uint8 (n, H, W, 3), all of one H and W.

    Raises:
        TypeError, ValueError: as the network does; no batch; images of several sizes.
    """
    device, size = next(inception.parameters()).device, None
    for images in batches:
        output = inception(images.to(device))
        size = size or images.shape[1:3]
        if images.shape[1:3] != size:
            raise ValueError(f"batches must hold images of one size, got {tuple(size)} and {tuple(images.shape[1:3])}")
        yield output
    if size is None:
        raise ValueError("batches must hold at least one image, got none")


def load_inception(path: str | Path, device: torch.device | str = "cpu") -> InceptionFeatures:
    """The network with the weights of `weights-inception-2015-12-05-6726825d.pth`, in evaluation mode, frozen.

    Args:
        path: local file, a release asset of torch-fidelity and of pytorch-fid (there `pt_inception-...`); nothing is
            downloaded and nothing in it executed.
        device: where the network goes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a file of these weights.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} can't be read as a file of weights ({error}); fetch it again") from error
    network = InceptionFeatures()
    try:
        missing, unexpected = network.load_state_dict(state, strict=False)
    except (RuntimeError, TypeError) as error:  # shapes; not a state dict
        raise ValueError(f"{path} {_WRONG_FILE}: {error}") from error
    # Counters that evaluation does not use, which old files are without.
    wrong = [name for name in (*missing, *unexpected) if not name.endswith("num_batches_tracked")]
    if wrong:
        raise ValueError(f"{path} {_WRONG_FILE}: {len(wrong)} keys missing or too many, such as {wrong[0]!r}")
    return network.to(device).eval().requires_grad_(False)


_WRONG_FILE = "does not hold FID's Inception, whose file is weights-inception-2015-12-05-6726825d.pth of torch-fidelity"


def resize_as_tensorflow(images: Tensor, side: int) -> Tensor:
    """Bilinear resize as TensorFlow 1 does it: output pixel i is taken at i * size / side, with no antialiasing.

    Torch's own puts it at (i + 0.5) * size / side - 0.5, which moves FID.

    Args:
        images: (N, C, H, W) float32.
        side: height and width of the result.

    Returns:
        (N, C, side, side) float32.
    """
    for axis in (3, 2):
        size = images.shape[axis]
        place = torch.arange(side, dtype=torch.float32, device=images.device) * (size / side)
        before = place.floor().long()
        after = (before + 1).clamp(max=size - 1)
        weight = (place - before).view(-1, *[1] * (3 - axis))
        low = images.index_select(axis, before)
        images = low + (images.index_select(axis, after) - low) * weight
    return images


class _Convolution(nn.Module):
    """Convolution, batch norm by stored statistics, ReLU; zeros around the image for stride 1, none for stride 2."""

    def __init__(self, channels: int, out_channels: int, kernel: Kernel, stride: int = 1, padding: int | None = None):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        around = (height // 2, width // 2) if stride == 1 else 0
        self.conv = nn.Conv2d(
            channels, out_channels, kernel, stride, around if padding is None else padding, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Branches side by side, concatenated over the channels, with a pooling branch last.

    A branch is a chain of (out_channels, kernel); two kernels in one link run side by side on the same input. In a
    block that halves the image, the last link of each branch has stride 2. A chain of one is called by its branch's
    name, the links of longer ones have their number behind it, and a or b where they are two.
    """

    def __init__(
        self,
        channels: int,
        branches: dict[str, Sequence[tuple[int, Kernel | list[Kernel]]]],
        pool: Pool,
        pooled: int | None = None,
    ):
        super().__init__()
        self.pool = pool
        self.chains: list[list[list[str]]] = []  # of each branch, of each link, the names of its convolutions
        for branch, chain in branches.items():
            width, links = channels, []
            for number, (out_channels, kernels) in enumerate(chain, 1):
                name = branch if len(chain) == 1 else f"{branch}_{number}"
                stride = 2 if pool == "max by 2" and number == len(chain) else 1
                several = isinstance(kernels, list)
                names = [f"{name}{letter}" for letter in "ab"] if several else [name]
                for part, kernel in zip(names, kernels if several else [kernels], strict=True):
                    self.add_module(part, _Convolution(width, out_channels, kernel, stride))
                width = out_channels * len(names)
                links.append(names)
            self.chains.append(links)
        if pooled is not None:
            self.branch_pool = _Convolution(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for links in self.chains:
            y = x
            for names in links:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            outputs.append(y)
        if self.pool == "average":
            y = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        elif self.pool == "max":
            y = F.max_pool2d(x, 3, stride=1, padding=1)
        else:
            y = F.max_pool2d(x, 3, stride=2)
        outputs.append(self.branch_pool(y) if hasattr(self, "branch_pool") else y)
        return torch.cat(outputs, 1)


def _mixed_35(channels: int, pooled: int) -> _Mixed:
    branches = {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
    }
    return _Mixed(channels, branches, "average", pooled)


def _mixed_17(width: int) -> _Mixed:
    row, column = (1, 7), (7, 1)
    branches = {
        "branch1x1": [(192, 1)],
        "branch7x7": [(width, 1), (width, row), (192, column)],
        "branch7x7dbl": [(width, 1), (width, column), (width, row), (width, column), (192, row)],
    }
    return _Mixed(768, branches, "average", pooled=192)


def _mixed_8(channels: int, pool: Pool) -> _Mixed:
    both = [(1, 3), (3, 1)]
    branches = {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), (384, both)],
        "branch3x3dbl": [(448, 1), (384, 3), (384, both)],
    }
    return _Mixed(channels, branches, pool, pooled=192)
