"""Rows as tensors: grey images, and text as windows of characters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flower_ext.core.errors import whole

if TYPE_CHECKING:
    from datasets import Dataset

CHARACTERS = 96  # newline, then the printable ASCII characters
# The id of every ASCII code: newline 0, "space" to "~" 1 to 95, all others that of "?".
_UNKNOWN = ord("?") - 31
_ID = [code - 31 if 32 <= code < 127 else _UNKNOWN for code in range(128)]
_ID[ord("\n")] = 0


def image_columns(rows: Dataset) -> dict[str, Tensor]:
    """Turn the rows of an image data set into tensors.

    Parameters
    ----------
    rows : datasets.Dataset
        With columns ``image``, uint8 of shape ``(height, width)``, and ``label``.

    Returns
    -------
    dict[str, Tensor]
        ``x``, float32 in [0, 1] of shape ``(n, 1, height, width)``, and ``y``, int64 of
        shape ``(n,)``.
    """
    labels = np.asarray(rows.select_columns("label").with_format("numpy")[:]["label"])
    return scaled(pixels(rows), labels)


def pixels(rows: Dataset) -> NDArray[Any]:
    """Return the column ``image`` of :func:`image_columns` as one array.

    Rows that are shuffled or selected one by one are slow to read: where many parts of
    a data set are wanted, read the whole and take parts of the array.
    """
    from datasets import Array2D

    feature = rows.features["image"]
    if not isinstance(feature, Array2D):
        return np.asarray(rows.select_columns("image").with_format("numpy")[:]["image"])
    # The numpy format copies image by image; what Arrow stores is an array already.
    column = rows.select_columns("image").with_format("arrow")[:]["image"]
    flat = column.combine_chunks().storage.flatten().flatten().to_numpy()
    return np.asarray(flat).reshape(len(rows), *feature.shape)


def scaled(images: NDArray[Any], labels: NDArray[Any]) -> dict[str, Tensor]:
    """Return images and their labels as :func:`image_columns` does."""
    x = torch.from_numpy(np.divide(images, 255, dtype=np.float32))
    return {"x": x.unsqueeze(1), "y": torch.from_numpy(np.asarray(labels, np.int64))}


def character_windows(text: str, window: int) -> Tensor:
    """Cut a text into windows of ``window + 1`` characters that overlap by one.

    The first ``window`` characters of each are a model's input, the last ``window`` are
    what it is to predict.

    Parameters
    ----------
    text : str
        Newline is 0, the printable ASCII characters are 1 to 95; others become ``?``.
    window : int
        Characters to predict in each window, at least 1. A text that is shorter is
        padded with newlines; what does not fill a last window is left out.

    Returns
    -------
    Tensor
        uint8 of shape ``(windows, window + 1)``.

    Examples
    --------
    >>> from flower_ext.data.tensors import character_windows
    >>> character_windows(" !!", 2).tolist(), character_windows("~é", 4).tolist()
    ([[1, 2, 2]], [[95, 32, 0, 0, 0]])
    """
    whole("window", window, 1)
    ids = torch.tensor([_ID[i] for i in text.encode("ascii", "replace")]).byte()
    missing = max(0, window + 1 - len(ids))
    ids = torch.cat([ids, torch.zeros(missing, dtype=torch.uint8)])
    return ids.unfold(0, window + 1, window).contiguous()
