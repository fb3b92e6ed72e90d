"""What travels: codecs of named arrays, and what all of it costs."""

from flower_ext.wire.chain import Chain, FixedMask, Selection, TopK
from flower_ext.wire.codec import Codec, Sending, Stage
from flower_ext.wire.universal import UniversalCode
from flower_ext.wire.value_codes import NF4, BFloat16, Exact, ValueCode
from flower_ext.wire.wrappers import Described, ErrorFeedback

__all__ = [
    "NF4",
    "BFloat16",
    "Chain",
    "Codec",
    "Described",
    "ErrorFeedback",
    "Exact",
    "FixedMask",
    "Selection",
    "Sending",
    "Stage",
    "TopK",
    "UniversalCode",
    "ValueCode",
]
