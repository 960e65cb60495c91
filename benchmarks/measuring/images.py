"""Images to train on: CIFAR-10 from a local folder in its own distribution formats, else scikit-learn's digits."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

CIFAR10_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR10_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Images:
    """Training images: ``pixels`` [n, 3, h, w] uint8 and ``labels`` [n] int64, from 0 to 9."""

    name: str
    pixels: Tensor
    labels: Tensor

    def batch(self, indices: Tensor, size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The chosen images, enlarged to ``size`` x ``size`` and normalised to -1 .. 1, and their labels."""
        small = self.pixels[indices].to(device).float() / 127.5 - 1.0
        enlarged = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
        return enlarged.to(dtype), self.labels[indices].to(device)


def index_batches(images: int, batch_size: int, total: int, seed: int) -> Iterator[Tensor]:
    """Index batches over ``total`` images: every image once in random order, then again in another order.

    The last batch holds what is left, so that an epoch of ``total`` images is exactly that.
    """
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    given = 0
    while given < total:
        wanted = min(batch_size, total - given)
        while len(waiting) < wanted:
            waiting = torch.cat([waiting, torch.randperm(images, generator=generator)])
        yield waiting[:wanted]
        waiting = waiting[wanted:]
        given += wanted


def load(folder: Path | None) -> Images:
    """CIFAR-10's training images from ``folder``, or the digits where it is None."""
    return digits() if folder is None else cifar10(folder)


def digits() -> Images:
    """scikit-learn's 1,797 scanned digits, 8x8 grey levels from 0 to 16, as three equal channels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = torch.from_numpy(bunch.images * (255.0 / 16.0)).round().to(torch.uint8)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    return Images("digits", grey[:, None].repeat(1, 3, 1, 1), labels)


def cifar10(folder: Path, images_per_file: int = 10_000) -> Images:
    """CIFAR-10's training images from its Python or its binary distribution.

    ``folder`` is the batches folder itself or the one that holds it.
    """
    for candidate in (folder, folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin"):
        for suffix, read in (("", _read_pickle), (".bin", _read_binary)):
            paths = [candidate / (name + suffix) for name in CIFAR10_FILES]
            if not any(path.is_file() for path in paths):
                continue
            missing = [path.name for path in paths if not path.is_file()]
            if missing:
                raise ValueError(f"data: {candidate} lacks {', '.join(missing)} of CIFAR-10")
            batches = [_checked(path, *read(path), images_per_file) for path in paths]
            pixels = np.concatenate([pixels for pixels, _ in batches])
            labels = np.concatenate([labels for _, labels in batches])
            return Images("CIFAR-10", torch.from_numpy(pixels), torch.from_numpy(labels))
    raise ValueError(
        f"data: {folder} holds no CIFAR-10: expected data_batch_1 to 5 (cifar-10-batches-py) or "
        "data_batch_1.bin to 5.bin (cifar-10-batches-bin), there or in a folder of that name"
    )


# numpy's own function that a pickled array names, wherever this numpy keeps it.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds plain containers and numpy arrays and refuses to name anything else: a pickle can call any function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no array needs")
        return _ADMITTED[module, name]


def _read_pickle(path: Path) -> tuple[Any, Any]:
    try:
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        return batch[b"data"], np.asarray(batch[b"labels"])
    # A damaged pickle may raise anything at all, from EOFError to MemoryError's relatives.
    except Exception as error:
        raise ValueError(f"data: {path} is not a CIFAR-10 batch: {error!r}") from error


def _read_binary(path: Path) -> tuple[Any, Any]:
    content = np.fromfile(path, dtype=np.uint8)
    if content.size % (1 + CIFAR10_PIXELS):
        raise ValueError(f"data: {path} has {content.size} bytes, no multiple of {1 + CIFAR10_PIXELS} a CIFAR-10 image")
    records = content.reshape(-1, 1 + CIFAR10_PIXELS)
    return records[:, 1:], records[:, 0]


def _checked(path: Path, pixels: Any, labels: Any, images_per_file: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels as [n, 3, 32, 32] uint8 and labels as [n] int64, or a ValueError that names the file."""
    expected = (images_per_file, CIFAR10_PIXELS)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != expected:
        found = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(f"data: {path} holds pixels {found}, expected uint8 {expected}")
    if labels.shape != (images_per_file,) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"data: {path} holds labels that are not {images_per_file} integers from 0 to 9")
    return pixels.reshape(-1, 3, 32, 32), labels.astype(np.int64)
