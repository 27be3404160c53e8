"""Training on the kernels in bfloat16 ends within the spread of the reference's seeds, on a GPU."""

from __future__ import annotations

import pytest

from benchmarks.backend_parity import BATCH_SIZE, MODELS
from benchmarks.parity.backends import blobs, compare_backends
from diffmoe_kernels.triton_support import HAS_TRITON
from models import create_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_TRITON, reason="needs triton")]
STEPS = 200


@pytest.mark.parametrize("name", MODELS)
def test_training_on_the_kernels_ends_where_the_reference_does(name) -> None:
    batches = [(images.cuda(), labels.cuda()) for images, labels in blobs(STEPS, BATCH_SIZE)]
    measures = compare_backends(lambda backend: create_model(name, backend=backend), batches, backend="triton")
    for one in measures:
        assert one.passes, measures
