import pytest

from flower_ext.data import load
from flower_ext.data.text import speeches, split_point


def test_columns_order_and_split_by_time(plays, without_pip):
    data = load("shakespeare", min_words=1)
    assert data["train"].to_list() == [
        {
            "client": "hamlet/Ham",
            "play": "hamlet",
            "speaker": "Ham",
            "text": "To be, or not\nto be.",
        },
        {
            "client": "hamlet/Ham",
            "play": "hamlet",
            "speaker": "Ham",
            "text": "Words, words, words.",
        },
        {
            "client": "hamlet/Mar",
            "play": "hamlet",
            "speaker": "Mar",
            "text": "Holla!",
        },
    ]
    assert data["test"]["text"][:] == ["Nay.", "Who is there?"]


def test_min_words_counts_both_splits(plays, without_pip):
    # Hamlet has 10 words, Marcellus 4.
    assert set(load("shakespeare", min_words=10)["test"]["client"]) == {"hamlet/Ham"}
    assert len(set(load("shakespeare", min_words=4)["test"]["client"])) == 2
    with pytest.raises(ValueError, match="min_words=11 leaves no client.* 10 words"):
        load("shakespeare", min_words=11)


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "500", None])
def test_bad_min_words(plays, value):
    with pytest.raises(ValueError, match="min_words="):
        load("shakespeare", min_words=value)


@pytest.mark.parametrize(
    ("words", "first"),
    [([1, 1], 1), ([90, 10], 1), ([40, 40, 20], 2), ([1, 99], 1), ([99, 1, 1], 1)],
)
def test_split_point_is_nearest_to_a_fifth(words, first):
    assert split_point(words) == first


def test_sentence_inside_a_speech_is_no_speaker():
    play = "Ham.\nI say.\nNo.\nMore.\n\nHe goes away now.\nSo.\n"
    assert [speaker for speaker, _ in speeches(play)] == ["Ham"]


def test_headings_end_a_speech():
    play = "Ham.\nI go.\n\nACT II.\n\nA hall in Elsinore\n\nMar.\nYes.\nTHE END\n"
    assert list(speeches(play)) == [("Ham", "I go."), ("Mar", "Yes.")]
