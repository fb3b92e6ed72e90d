r"""StackedLoRA: adapters side by side are the exact mean, and become part of the base.

The mean of LoRA's factors is not that of their products. Side by side, though,

.. math::
   \begin{pmatrix} p_1 s_1 B_1 & \cdots & p_K s_K B_K \end{pmatrix}
   \begin{pmatrix} A_1 \\ \vdots \\ A_K \end{pmatrix} = \sum_k p_k s_k B_k A_k

is exact, whatever the ranks of the clients are (FLoRA: Wang, Shen, He, Sun, Wang, Lyu
and Li 2024, "FLoRA: federated fine-tuning large language models with heterogeneous
low-rank adaptations", NeurIPS, arXiv 2409.05976).
"""

from collections.abc import Callable, Sequence
from typing import Unpack

import numpy as np
import torch
from flwr.common import NDArray

from flower_ext.client.half import Local
from flower_ext.client.lora import LoRAClient
from flower_ext.client.tensors import Tensors
from flower_ext.core.arrays import Arrays
from flower_ext.core.errors import refuse, whole
from flower_ext.core.lora import Pair, Product, fresh_factor, require_adapter
from flower_ext.core.protocol import Config, Round
from flower_ext.server.lora import Layer, LoRAStrategy, Trained, mean_product
from flower_ext.server.options import AdditiveOptions

SEED_KEY = "adapter-seed"


class StackedLoRAClient(LoRAClient):
    """Begins every round with a new adapter, which it draws as the server does."""

    name = "stacked-lora"

    def receive(self, local: Local, arrays: Tensors) -> Tensors:
        """Change the base, and add the new adapter to what came."""
        came = super().receive(local, arrays)
        shapes = {name: np.empty(x.shape, np.float32) for name, x in local.end.items()}
        pairs, _ = require_adapter(shapes)
        key = int(local.number(SEED_KEY, 0)), local.server_round
        drawn = {
            name: torch.from_numpy(fresh_factor(name, shapes[name].shape, *key))
            for pair in pairs
            for name in (pair.a, pair.b)
        }
        return {**came, **drawn}


class StackedLoRA(LoRAStrategy):
    r"""Federated LoRA whose sum of adapters is merged into the base each round.

    Against averaging the factors: the base of all clients, and of the server, moves by
    exactly :math:`\sum_k p_k s_k B_k A_k`, where :math:`p_k` is the share of the
    examples and :math:`s_k` the scaling of the client's rank; and every round starts
    from a new adapter, which changes nothing (B is zero), as in the paper. The server's
    adapter stays the one that it was given; what is learned is in the head, if there is
    one, and in the change of the base: ``strategy.whole(result.arrays)``. Works with
    the client half :class:`StackedLoRAClient`.

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
    seed : int (default: 0)
        Of the new adapters.
    *flowers, **options
        Sampler, codecs and Flower's own options, see
        :class:`~flower_ext.server.options.RoundOptions`. No server optimizer.

    Raises
    ------
    ValueError
        When a round begins: if the initial model has no adapter that is made of whole
        pairs of matrices, all of one rank, or one that is not new: its B is not zero.

    Notes
    -----
    **What travels.** Up, the adapters as they are. Down, neither the adapter, which
    clients draw from the seed and the round, nor its initial values, but the change of
    the base since the start, so that clients that were not asked for many rounds, or
    never, have the server's base. Of each layer that is the two factors, of the rank of
    all rounds together, and once they are more numbers than the weight, the matrix:
    :math:`\min(r (d_{out} + d_{in}),\, d_{out} d_{in})`. Clients keep nothing. The
    paper's clients merge the stacked adapters of each round instead, which all of them
    must then receive; with few rounds and clients that is less. Codecs of ``download=``
    code the change with the head: what a client then trains on is the rounded base, and
    the server's own stays exact.

    It is no sum: factors side by side are not, and the sum of the products is of dense
    matrices, in float64 for every layer as large as the weights. The server holds
    factors as they were sent, and multiplies of one layer at a time what must be. There
    is no mechanism for that reason: noise would be on every entry of those matrices.

    The change of the base is kept in the type of the adapter, float32 usually; beyond
    that rounding nothing is lost. The metric ``agreement`` is the norm of the sum over
    the root mean square norm of the clients' products: 1 if all are alike,
    :math:`1/\sqrt K` if K of one size have nothing in common.

    Examples
    --------
    >>> strategy = StackedLoRA(lora_alpha=16, ranks=(2, 4, 8), fraction_train=0.1)
    >>> strategy.scaling_of(2), strategy.scaling_of(8)
    (8.0, 2.0)
    """

    client_half = StackedLoRAClient
    metric = "agreement"
    no_mechanism = (
        "the exact sum is of dense matrices, each entry of which would be noised: take "
        "AdditiveStrategy with frozen=('lora_A',), whose plain average is exact, too"
    )

    def __init__(
        self,
        *flowers: object,
        lora_alpha: float,
        use_rslora: bool = False,
        ranks: Sequence[int] = (),
        rank_of: Callable[[int], int] | None = None,
        seed: int = 0,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(
            *flowers,
            lora_alpha=lora_alpha,
            use_rslora=use_rslora,
            ranks=ranks,
            rank_of=rank_of,
            **options,
        )
        self.seed = whole("seed", seed, 0)

    def tell(self, round: Round) -> Config:
        """Tell clients what to draw the new adapter from."""
        return {SEED_KEY: self.seed}

    def layers(self, sent: Arrays) -> tuple[list[Pair], int]:
        """Return the adapter of a model, which must be new, and its rank."""
        found, rank = super().layers(sent)
        for pair in found:
            if np.any(sent[pair.b]):
                cause = (
                    "merge a trained adapter into the base, and begin with a new one"
                )
                refuse(f"initial_arrays[{pair.b!r}]", "...", "zero", cause)
        return found, rank

    def begin(self, rank: int, round: Round) -> Arrays:
        """Return the new adapter of a rank, with all else of the model."""
        sent = dict(round.sent)
        for pair in self.layers(round.sent)[0]:
            shapes = {
                pair.a: (rank, sent[pair.a].shape[1]),
                pair.b: (sent[pair.b].shape[0], rank),
            }
            for name, shape in shapes.items():
                new = fresh_factor(name, shape, self.seed, round.number)
                sent[name] = new.astype(sent[name].dtype)
        return sent

    def sends(self, rank: int, round: Round) -> Arrays:
        """Return the model without its adapter, which clients draw."""
        adapter = {name for pair in self.layers(round.sent)[0] for name in pair[1:]}
        return {name: x for name, x in round.sent.items() if name not in adapter}

    def combine(self, a: NDArray, b: NDArray, trained: Sequence[Trained]) -> Layer:
        """Return the sum, for the base; the server's adapter stays."""
        apart = sum(
            t.share * (t.scaling * Product(t.b, t.a).norm) ** 2 for t in trained
        )
        products = mean_product(trained)
        return Layer(a, b, products, (products.norm**2, apart))
