"""Types of the arrays that the maths is written in."""

import numpy as np
from numpy.typing import NDArray

#: What is computed: everything the server adds up, and every privacy loss.
Floats = NDArray[np.float64]
#: What may be stored or sent to save memory.
AnyFloats = NDArray[np.float32] | NDArray[np.float64]
