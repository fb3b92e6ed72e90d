"""A codec of a user's own."""

from dataclasses import dataclass

import numpy as np

from flower_ext.wire import ValueCode


@dataclass(frozen=True)
class Rounded(ValueCode):
    """A codec of one's own, that draws: multiples of a step, up or down."""

    step: float = 0.01

    tag = b"rd"

    @classmethod
    def length(cls, count, dtype):
        return 4 + 4 * count

    def encode_values(self, values, generator):
        codes = np.floor(values / self.step + generator.random(values.shape))
        return np.float32([self.step]).tobytes() + codes.astype(np.float32).tobytes()

    @classmethod
    def decode_values(cls, data, count, dtype):
        step, *codes = np.frombuffer(data, np.float32)
        return np.array(codes, dtype) * dtype.type(step)
