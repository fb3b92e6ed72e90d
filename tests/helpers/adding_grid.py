"""A grid in this process that adds replies up as workers do."""

import pickle

from flower_ext.core.held import holding_replies
from flower_ext.server.partial_sums import PackSum, PartialSum
from flower_ext.simulation.local import LocalGrid

# Of one client and of two, in a cohort of three: a sum that is added once for each
# client and not once for each pack shows.
PACKS = 2


class AddingGrid(LocalGrid):
    """Adds up in packs, as workers do: each reply before the next client, in any order.

    Replies hold their arrays, unless the clients are remembered ones.
    """

    def send_and_sum(self, messages, summand, *, timeout):
        summand = pickle.loads(pickle.dumps(summand))
        into = [PartialSum(summand) for _ in range(PACKS)]
        members = [[] for _ in into]
        replies = []
        for i, message in enumerate(messages):
            with holding_replies():
                [reply] = self.send_and_receive([message])
                replies.append(reply)
                if reply.has_error():
                    continue
                rest = into[i % PACKS].add(reply.content, reply.metadata.src_node_id)
            assert not rest.array_records
            reply.content = rest
            if not rest.problem:
                members[i % PACKS].append(reply)
        for part, its in zip(into, members, strict=True):
            nodes = frozenset(reply.metadata.src_node_id for reply in its)
            pack = PackSum(part.total, nodes)
            for reply in its:
                reply.content.pack = pack
        return self.deliver(replies)

    def deliver(self, replies):
        """Hand over in an order that tells nothing."""
        return replies[::-1]
