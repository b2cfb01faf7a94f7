"""Settings of a plan that make a network small enough for tests of the whole line."""

from __future__ import annotations

from typing import Any

SMALL_NETWORK: dict[str, Any] = {
    "network.strides": [[1, 1, 1], [2, 2, 2]],
    "network.kernel_sizes": [[3, 3, 3]] * 2,
    "network.blocks_per_stage_encoder": [1, 1],
    "network.blocks_per_stage_decoder": [1],
    "network.patch_size": [16, 16, 16],
    "training.batch_size": 2,
}
"""Two stages; the features of each, and how long is trained, the test chooses."""
