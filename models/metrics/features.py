"""The small digit classifier whose penultimate layer gives the features of digits-FD."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.data import DataSplits, collect

FEATURES = 64
EPOCHS = 20
BATCH_SIZE = 64
PEAK_LR = 3e-3
SEED = 0


class DigitsClassifier(nn.Module):
    """Two convolutions and a hidden layer for small images, in float64.

    Float64 makes the metric reproducible: in float32 the rounding of another thread count or another processor grows
    during training until digits-FD differs in its first or second digit; in float64 it agrees to many digits.
    """

    def __init__(self, image_size: int, channels: int, num_classes: int):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1, dtype=torch.float64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1, dtype=torch.float64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * (image_size // 4) ** 2, FEATURES, dtype=torch.float64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, num_classes, dtype=torch.float64)

    def features(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) float in [-1, 1] -> penultimate activations (N, 64) float64."""
        return self.trunk(images.double())

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) float in [-1, 1] -> class logits (N, num_classes) float64."""
        return self.head(self.features(images))


def train_classifier(data: DataSplits) -> DigitsClassifier:
    """Train the classifier on `data.train` from a fixed seed: about 3 s for the digits on one core.

    The result depends on nothing but the data: the caller's random state and gradient mode are neither used nor
    changed. Training images are shifted by up to one pixel and labels smoothed, so that the features tell training
    images from held-out ones as little as possible.

    Returns:
        The classifier on the CPU, in eval mode, its parameters frozen.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        images, labels = collect(data.train)
        torch.default_generator.manual_seed(SEED)  # torch.manual_seed would reseed the caller's GPUs too
        classifier = DigitsClassifier(data.image_size, data.channels, data.num_classes)
        steps_per_epoch = -(-len(images) // BATCH_SIZE)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=PEAK_LR, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=EPOCHS * steps_per_epoch)
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(images)).split(BATCH_SIZE):
                logits = classifier(_shifted(images[batch]))
                loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return classifier.eval().requires_grad_(False)


def _shifted(images: Tensor) -> Tensor:
    """Each image (N, C, H, W) moved by -1, 0 or 1 pixel in both directions, background (-1) flowing in."""
    count, channels, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    dy, dx = torch.randint(3, (2, count, 1))
    ys = (dy + torch.arange(height))[:, None, :, None]
    xs = (dx + torch.arange(width))[:, None, None, :]
    return padded[torch.arange(count)[:, None, None, None], torch.arange(channels)[:, None, None], ys, xs]
