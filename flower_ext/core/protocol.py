"""What server and clients say to each other: keys of records, words that both know."""

from flwr.app import MetricRecordValues

Metrics = dict[str, MetricRecordValues]

ARRAYS_KEY = "arrays"
CONFIG_KEY = "config"
METRICS_KEY = "metrics"
CLIENT_HALF_KEY = "client-half"
# A record of a run that is saved: its name, and the round after which it was resumed.
RUN_KEY = "run"
RUN_NAME = "name"
RUN_RESUMED = "resumed-after"

# Records of ``context.state`` under such keys say what a client has spent. A checkpoint
# puts none of them back: what was charged after it was saved is spent all the same.
ACCOUNT_PREFIX = "account/"

# The server finds it in the reason of an error reply.
WRONG_HALF = "the strategy needs the client half"
