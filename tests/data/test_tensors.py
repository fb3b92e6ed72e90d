"""Images and characters as tensors, against the rows and the text they came from."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import example, given
from hypothesis import strategies as st

from flower_ext.data.tensors import CHARACTERS, character_windows, image_columns


def read(ids):
    return "".join("\n" if i == 0 else chr(i + 31) for i in ids)


def test_images_are_scaled_and_keep_their_labels():
    pixels = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4) * 11
    rows = Dataset.from_dict({"image": pixels, "label": [7, 2]})
    found = image_columns(rows)
    assert found["x"].dtype == torch.float32
    assert found["y"].dtype == torch.int64
    np.testing.assert_allclose(found["x"].squeeze(1).numpy(), pixels / 255, rtol=1e-6)
    assert found["x"].shape == (2, 1, 3, 4)
    assert found["y"].tolist() == [7, 2]


@given(st.text(max_size=60), st.integers(1, 20))
@example("", 1)
@example("tab\tdel\x7fé\n~ ", 4)
def test_windows_spell_the_text_and_overlap_by_one(text, window):
    windows = character_windows(text, window)
    assert windows.dtype == torch.uint8
    assert windows.shape[1] == window + 1
    assert windows.max() < CHARACTERS
    assert torch.equal(windows[1:, 0], windows[:-1, -1])
    known = "".join(c if c == "\n" or " " <= c <= "~" else "?" for c in text)
    spelled = read(windows[:, :-1].flatten()) + read(windows[-1, -1:])
    if len(known) > window:
        assert known.startswith(spelled)
        assert len(known) - len(spelled) < window
    else:
        assert spelled == known.ljust(window + 1, "\n")


def test_a_window_of_no_characters_is_refused():
    with pytest.raises(ValueError, match="window=0 must be"):
        character_windows("text", 0)
