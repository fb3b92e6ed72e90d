r"""FlexLoRA: the mean of the products, as close as the rank of each client allows.

The mean of LoRA's factors is not that of their products. FlexLoRA decomposes the latter
and gives every client of rank r the first r singular vectors of it,

.. math::
   \sum_k p_k s_k B_k A_k = U S V^\top, \qquad
   s_r B^{(r)} A^{(r)} = U_{:r} S_{:r} V_{:r}^\top,

(Bai, Chen, Qian, Yao and Li 2024, "Federated fine-tuning of large language models under
heterogeneous tasks and client resources", NeurIPS, arXiv 2402.11505). No approximation
of that rank is closer (Eckart and Young 1936): what is lost are the singular values
left out.
"""

from collections.abc import Sequence

import numpy as np
from flwr.common import NDArray

from flower_ext.client.lora import LoRAClient
from flower_ext.core.arrays import Arrays
from flower_ext.core.lora import by_singular_value
from flower_ext.core.protocol import Round
from flower_ext.server.lora import Layer, LoRAStrategy, Trained, mean_product


class FlexLoRAClient(LoRAClient):
    """Trains an adapter of its own rank."""

    name = "flex-lora"


class FlexLoRA(LoRAStrategy):
    r"""Federated LoRA by the mean of the products, decomposed to every rank.

    Against averaging the factors: the server's adapter becomes the best approximation,
    of its rank, of :math:`\sum_k p_k s_k B_k A_k`, where :math:`p_k` is the share of
    the examples and :math:`s_k` the scaling of the client's rank; clients of rank r
    hold the best one of rank r. The base stays as it is, so that the result is an
    adapter like any other. Works with the client half :class:`FlexLoRAClient`.

    Parameters
    ----------
    lora_alpha : float
        That of the clients' ``LoraConfig``, of any rank. Clients whose adapters are
        scaled otherwise refuse.
    use_rslora : bool (default: False)
        Likewise: products are scaled by :math:`\alpha/\sqrt r`, not :math:`\alpha/r`.
    ranks : sequence of int, optional
        Ranks of clients that differ, at most that of the initial model; by default all
        have that.
    rank_of : callable, optional
        ``client -> its rank``, where the client is its place among the nodes; by
        default ``ranks[client % len(ranks)]``.
    *flowers, **options
        Sampler, codecs and Flower's own options, see
        :class:`~flower_ext.server.options.RoundOptions`. No server optimizer.

    Raises
    ------
    ValueError
        When a round begins: if the initial model has no adapter that is made of whole
        pairs of matrices, all of one rank.

    Notes
    -----
    Of the singular vectors the adapter is :math:`A = c V^\top`, :math:`B = U S/(s c)`,
    where c is the root mean square norm of a row of the clients' A, so that A learns as
    fast as theirs do. Where the mean has fewer ranks than the adapter, the further rows
    of A are of the span of the last A, and B is zero there: they can be used next.

    It is no sum as it is computed: from thin QR decompositions of the factors side by
    side, exact and of one layer at a time, where the sum of the products would be of
    dense matrices as large as the weights. For the same reason there is no mechanism.
    After a round the coordinates are others: codecs with error feedback are refused.

    The metric ``discarded-share`` is the norm of what the server's rank has left out
    over that of the mean of the products, in the Frobenius norm, all layers together.

    Examples
    --------
    >>> strategy = FlexLoRA(lora_alpha=16, ranks=(2, 4, 8), fraction_train=0.1)
    >>> strategy.scaling_of(2), strategy.scaling_of(8)
    (8.0, 2.0)
    """

    client_half = FlexLoRAClient
    metric = "discarded-share"
    no_mechanism = (
        "the exact sum is of dense matrices, each entry of which would be noised: take "
        "AdditiveStrategy with frozen=('lora_A',), whose plain average is exact, too"
    )

    def begin(self, rank: int, round: Round) -> Arrays:
        """Return the model with the first ranks of its adapter, by singular value."""
        pairs, full = self.layers(round.sent)
        if rank == full:
            return round.sent
        sent, factor = dict(round.sent), self.scaling_of(full) / self.scaling_of(rank)
        for pair in pairs:
            names = pair[1:]
            best = by_singular_value({name: sent[name] for name in names})
            first = best[pair.a][:rank], factor * best[pair.b][:, :rank]
            for name, x in zip(names, first, strict=True):
                sent[name] = x.astype(sent[name].dtype)
        return sent

    def combine(self, a: NDArray, b: NDArray, trained: Sequence[Trained]) -> Layer:
        """Return the best approximation of the mean product."""
        rank, scale = len(a), self.scaling_of(len(a))
        products = mean_product(trained)
        u, s, v = products.svd()
        kept = min(rank, int(np.sum(s > 4 * np.finfo(b.dtype).eps * s[:1].sum())))
        # The directions of further rows are of no account to the product, but are what
        # its unused ranks can learn next: those of A that it does not use.
        used = v[:kept]
        free = np.linalg.svd(a - (a @ used.T) @ used, full_matrices=False)[2]
        rows = np.concatenate([used, free[: rank - kept]])
        lengths = [t.share * np.sum(t.a**2) / len(t.a) for t in trained]
        length = float(np.sqrt(np.sum(lengths))) or 1.0
        new_a, new_b = np.zeros(a.shape), np.zeros(b.shape)
        new_a[: len(rows)] = length * rows
        new_b[:, :kept] = u[:, :kept] * s[:kept] / (length * scale)
        sizes = float(np.sum(s[kept:] ** 2)), float(np.sum(s**2))
        return Layer(new_a, new_b, sizes=sizes)
