r"""FedExLoRA: LoRA's factors are averaged, and what that loses goes into the base.

The mean of the factors is not that of their products. The rest,

.. math::
   \Delta W = s \Bigl(\sum_k p_k B_k A_k - \bar B \bar A\Bigr), \qquad
   \bar B = \sum_k p_k B_k, \quad \bar A = \sum_k p_k A_k,

is added to the frozen weights, at the server and at all clients (Singhal, Ponkshe and
Vepakomma 2024, "FedEx-LoRA: exact aggregation for federated and efficient fine-tuning
of foundation models", arXiv 2410.09432, equations 5 to 8).
"""

from collections.abc import Mapping, Sequence
from typing import Unpack, cast

import numpy as np
from flwr.common import NDArray

from flower_ext.client.lora import LoRAClient
from flower_ext.core.arrays import norm
from flower_ext.core.errors import refuse
from flower_ext.core.lora import sum_of_products
from flower_ext.server.lora import Layer, LoRAStrategy, Trained, mean_product
from flower_ext.server.optimizers import apply_direction
from flower_ext.server.options import AdditiveOptions


class FedExLoRAClient(LoRAClient):
    """Trains the mean adapter on the base that has the residuals of all rounds."""

    name = "fedex-lora"


class FedExLoRA(LoRAStrategy):
    r"""Federated averaging of LoRA with the residual of the products in the base.

    Against averaging the factors alone: the model is exactly the mean of the clients'
    models, :math:`W + \sum_k p_k s B_k A_k`, where :math:`p_k` is the share of the
    examples and s the scaling; clients go on with the mean adapter. The result is an
    adapter and a change of the base: ``strategy.whole(result.arrays)``. Works with the
    client half :class:`FedExLoRAClient`.

    Parameters
    ----------
    lora_alpha : float
        That of the clients' ``LoraConfig``. Clients whose adapters are scaled otherwise
        refuse.
    use_rslora : bool (default: False)
        Likewise: products are scaled by :math:`\alpha/\sqrt r`, not :math:`\alpha/r`.
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
    All clients have one rank: the mean of factors is of one shape. The residual is
    counted from the mean factors as the model holds them, rounding and all.

    **What travels.** Up, the adapters. Down, the mean adapter and the sum of all
    residuals, so that clients that were not asked for many rounds, or never, have the
    server's base: of each layer two factors of the rank of all residuals together, and
    once they are more numbers than the weight, the matrix. Clients keep nothing. The
    paper sends the residual of each round, which all clients must then receive. Codecs
    of ``download=`` code the residuals with the adapter: what a client then trains on
    is the rounded base, and the server's own stays exact.

    It is no sum: the residual needs the clients' products, whose sum is of dense
    matrices, in float64 for every layer as large as the weights. The server holds
    factors as they were sent, and multiplies of one layer at a time what must be. For
    the same reason there is no mechanism. The paper weighs all clients alike, here they
    weigh by their examples.

    The metric ``residual-share`` is the norm of the round's residual over that of the
    mean product, in the Frobenius norm, all layers together: what averaging the factors
    would have lost.

    Examples
    --------
    >>> strategy = FedExLoRA(lora_alpha=16, fraction_train=0.1)
    >>> strategy.scaling_of(8)
    2.0
    """

    client_half = FedExLoRAClient
    metric = "residual-share"
    keeps_coordinates = True
    no_mechanism = (
        "the residual is of dense matrices, each entry of which would be noised: take "
        "AdditiveStrategy with frozen=('lora_A',), whose plain average is exact, too"
    )

    def __init__(
        self,
        *flowers: object,
        lora_alpha: float,
        use_rslora: bool = False,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        for name in ("ranks", "rank_of"):
            if name in options:
                cause = "the mean of factors is of one shape; FlexLoRA takes any ranks"
                refuse(
                    name, cast(Mapping[str, object], options)[name], "left out", cause
                )
        super().__init__(
            *flowers, lora_alpha=lora_alpha, use_rslora=use_rslora, **options
        )

    def combine(self, a: NDArray, b: NDArray, trained: Sequence[Trained]) -> Layer:
        """Return the means of the factors, and the residual for the base."""
        mean_a = np.sum([t.share * t.a for t in trained], axis=0)
        mean_b = np.sum([t.share * t.b for t in trained], axis=0)
        # As the model will hold them.
        held_a = apply_direction(a, mean_a - a)
        held_b = apply_direction(b, mean_b - b)
        products = mean_product(trained)
        scale = trained[0].scaling
        residual = sum_of_products([(1.0, *products), (-scale, held_b, held_a)])
        # Where all are alike it is the rounding of the factors, of which a base that is
        # to stay of low rank must have nothing.
        rounding = 4 * np.finfo(b.dtype).eps * scale * norm([mean_a]) * norm([mean_b])
        rest = residual if residual.norm > rounding else None
        return Layer(mean_a, mean_b, rest, (residual.norm**2, products.norm**2))
