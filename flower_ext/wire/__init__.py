"""What travels: codecs of named arrays, and what all of it costs."""

from flower_ext.wire.chain import Chain, FixedMask, Selection, TopK
from flower_ext.wire.codec import Codec, Sending, Stage
from flower_ext.wire.one_bit import OneBit
from flower_ext.wire.permutation import Permutation
from flower_ext.wire.pruned import Kept, Nonzero
from flower_ext.wire.qsgd import QSGD
from flower_ext.wire.random_k import RandomK
from flower_ext.wire.rotated import DRIVE, EDEN
from flower_ext.wire.rows import Rows
from flower_ext.wire.terngrad import TernGrad
from flower_ext.wire.three_lc import ThreeLC
from flower_ext.wire.universal import UniversalCode
from flower_ext.wire.value_codes import NF4, BFloat16, Exact, ValueCode
from flower_ext.wire.vote import Voted
from flower_ext.wire.wrappers import AnyOf, Described, ErrorFeedback

__all__ = [
    "DRIVE",
    "EDEN",
    "NF4",
    "QSGD",
    "AnyOf",
    "BFloat16",
    "Chain",
    "Codec",
    "Described",
    "ErrorFeedback",
    "Exact",
    "FixedMask",
    "Kept",
    "Nonzero",
    "OneBit",
    "Permutation",
    "RandomK",
    "Rows",
    "Selection",
    "Sending",
    "Stage",
    "TernGrad",
    "ThreeLC",
    "TopK",
    "UniversalCode",
    "ValueCode",
    "Voted",
]
