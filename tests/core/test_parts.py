"""Filters on the names of arrays: what they match, and what is refused."""

import re

import pytest

from flower_ext.core.parts import personal_names, require_filter

NAMES = ["body.weight", "body.bias", "head.weight", "head.bias", "scale"]


@pytest.mark.parametrize(
    ("personal", "found"),
    [
        ("head.*", ["head.weight", "head.bias"]),
        (["*.bias", "scale"], ["body.bias", "head.bias", "scale"]),
        (("head.bias", "head.*"), ["head.weight", "head.bias"]),
        (lambda name: "body" not in name, ["head.weight", "head.bias", "scale"]),
        (None, ["scale"]),
        ("[bh]*.weight", ["body.weight", "head.weight"]),
    ],
)
def test_a_filter_matches(personal, found):
    assert personal_names(iter(NAMES), require_filter(personal)) == found


def test_the_last_layer_is_all_of_it_and_no_more():
    names = ["block.0.out.weight", "block.1.out.weight", "block.1.out.lora.A"]
    assert personal_names([*names, "block.1.out.lora.B"], None) == [
        "block.1.out.lora.A",
        "block.1.out.lora.B",
    ]


@pytest.mark.parametrize(
    ("personal", "words"),
    [
        ("hed.*", "personal='hed.*' must be a filter that matches arrays"),
        (["head.*", "Scale"], "personal='Scale' must be a filter that matches arrays"),
        ("head", 'a layer\'s arrays are "<name of the layer>.*"'),
        (lambda name: False, "it matches none of ['body.weight'"),
        ("*", "personal='*' must be a filter that leaves others"),
        (lambda name: True, "share nothing train alone, as LocalOnly's do"),
    ],
)
def test_a_filter_of_no_array_or_all_is_refused(personal, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        personal_names(NAMES, personal)


@pytest.mark.parametrize("personal", [[], 3, [3], ["head.*", None], {"head.*"}])
def test_what_is_no_filter_is_refused(personal):
    with pytest.raises(ValueError, match="FedAvg is the strategy"):
        require_filter(personal)
