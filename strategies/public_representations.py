r"""Public representations: a head is trained privately on an encoder that is public.

Thaker, Setlur, Wu and Smith 2024, "On the benefits of public representations for
private transfer learning under distribution shift", NeurIPS, arXiv 2312.15551.
"""

import zlib
from collections.abc import Mapping
from typing import Unpack, cast

import numpy as np
from flwr.common import NDArray
from torch import nn

from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.tensors import Tensors
from flower_ext.core.arrays import Arrays, is_parameter
from flower_ext.core.contribution import DELTA, Contribution, no_change
from flower_ext.core.errors import refuse
from flower_ext.core.parts import Filter, matching_names, require_filter
from flower_ext.core.protocol import Config, Payload, Reply, Round
from flower_ext.core.ties import equal_in_model
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.drop_in import DropIn
from flower_ext.server.options import AdditiveOptions

#: In the configuration: the arrays that travel, and a checksum of the others.
HEAD = "public-head"
CHECKSUM = "public-checksum"


def checksum(arrays: Mapping[str, NDArray]) -> str:
    """Return what tells arrays from others, in any order of theirs; empty of none."""
    found = 0
    for name, x in sorted(arrays.items()):
        found = zlib.crc32(repr((name, x.shape)).encode(), found)
        found = zlib.crc32(np.ascontiguousarray(x).tobytes(), found)
    return f"{found:08x}" if arrays else ""


class PublicRepresentationsClient(ClientHalf):
    """Trains what it was sent, on an encoder of its own that stays as it is.

    The encoder is what ``Task.model`` makes. It computes as in evaluations, without
    dropout and with BatchNorm's statistics as they are.
    """

    name = "public-representations"
    post_processing = True  # it sends the trained head

    def receive(self, local: Local, arrays: Tensors) -> Tensors:
        """Put the head on the client's own encoder."""
        own = dict(local.model.state_dict())
        if unknown := arrays.keys() - own.keys():
            cause = "Task.model must make the model that the server has"
            refuse("head", sorted(unknown), f"of the arrays {list(own)[:5]}", cause)
        public = {n: x.cpu().numpy() for n, x in own.items() if n not in arrays}
        told, found = str(local.config.get(CHECKSUM, "")), checksum(public)
        if told and told != found:
            bound = f"the server's public one, of checksum {told}"
            cause = "it never travels: both sides load it from the same file"
            refuse("Task.model's encoder", found, bound, cause)
        return {**own, **arrays}

    def begin(self, local: Local) -> None:
        """Freeze all but the head."""
        head = local.came.keys()
        for name, p in local.model.named_parameters():
            p.requires_grad_(p.requires_grad and name in head)
        _keep_evaluating(local.model)

    def model_to_send(self, local: Local) -> Tensors:
        """Send the head."""
        return {name: x for name, x in local.end.items() if name in local.came}


def _keep_evaluating(model: nn.Module) -> None:
    """Let layers of which nothing is trained compute as in evaluations, for good."""
    if any(p.requires_grad for p in model.parameters()):
        for layer in model.children():
            _keep_evaluating(layer)
    elif any(True for _ in model.state_dict()):
        model.eval()
        model.train = lambda mode=True: model  # type: ignore[method-assign]


class PublicRepresentations(AdditiveStrategy):
    r"""Federated averaging of a head on an encoder that is public, and never travels.

    Against FedAvg, the arrays are split into a head :math:`w` and the rest, an encoder
    :math:`\phi` that was trained on public data. All clients have it; they train the
    head on what it makes of their examples:

    .. math::
       w_k \leftarrow \mathrm{SGD}_w\bigl(\ell(w; \phi(x_k), y_k)\bigr), \qquad
       w \leftarrow w + \frac{\sum_k n_k (w_k - w)}{\sum_k n_k} .

    So the head is all that travels, that is clipped and that noise is added to: by a
    mechanism, for clients, and by ``DPSGD`` in a silo, for examples. Behind a
    :class:`~flower_ext.client.public.PublicProjection` it is smaller still, a head on k
    directions of public data (the paper's section 5). Works with the client half
    :class:`PublicRepresentationsClient`.

    Parameters
    ----------
    head : str, sequence of str or callable, optional
        The arrays that are trained: patterns of names such as ``"head.*"``, as of
        :mod:`fnmatch`, or a function ``name -> bool``. By default the model's last
        layer. A filter of all arrays, where features were computed beforehand or the
        model's ``state_dict`` has the head only
        (:class:`~flower_ext.client.adapters.AdapterModel`), is FedAvg.
    *flowers, **options
        Server optimizer, sampler, mechanism, codecs and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Raises
    ------
    ValueError
        If a pattern matches no array; if nothing of the head is trained; if one tensor
        is both in the head and in the encoder; in ``configure_train``, before a client
        is asked. Clients refuse whose encoder is another than the server's.

    Notes
    -----
    **Guarantee.** That of the mechanism, or of ``DPSGD``, on the head. The encoder, and
    a projection, are outside of it: *they must be public*, trained and estimated on
    none of the data that is to be protected. That cannot be checked here.

    Clients keep nothing. The encoder's arrays in the result are those of the initial
    model, bit for bit. That clients have the same is seen from a CRC-32 of it, which
    finds other files and forgotten weights, not an adversary.

    The paper learns its subspace by a method of moments, and the head by noisy gradient
    descent at one server. Here the subspace is that of singular vectors, and the head
    is trained by whatever the federation trains with.

    Examples
    --------
    >>> strategy = PublicRepresentations(head="head.*", fraction_train=0.1)
    """

    client_half = PublicRepresentationsClient
    drop_in = DropIn(
        fill_in=(
            "the message has the head's arrays only, and so must the reply:\n"
            "model.load_state_dict(arrays, strict=False), on the public encoder\n"
            "freeze(model, lambda name: name not in arrays), of flower_ext.client.parts"
        ),
    )

    def __init__(
        self,
        *flowers: object,
        head: Filter = None,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(*flowers, **options)
        # Of the server alone: a function need not be picklable.
        self._head = require_filter(head, "head", "something must be trained")

    def head(self, sent: Arrays) -> Arrays:
        """Return the arrays of a model that are trained and travel."""
        names = matching_names(list(sent), self._head, "head")
        head = {name: sent[name] for name in names}
        if not any(is_parameter(name, x) for name, x in head.items()):
            refuse("head", self._head, "a filter of what is trained", f"not {names}")
        for name, first in equal_in_model(sent).items():
            if (name in head) != (first in head):
                cause = "they are equal in the initial model, as one tensor is"
                bound = f"a filter that matches both {first!r} and {name!r}, or none"
                refuse("head", self._head, bound, cause)
        return head

    def tell(self, round: Round) -> Config:
        """Tell clients which encoder the head is for."""
        head = self.head(round.sent)
        rest = {name: x for name, x in round.sent.items() if name not in head}
        return {**super().tell(round), HEAD: [*head], CHECKSUM: checksum(rest)}

    def payload(self, variant: object, round: Round) -> Payload:
        """Send the head."""
        return Payload(self.head(round.sent))

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        """Return the change of the head."""
        head = {n: round.sent[n] for n in cast("list[str]", round.told[HEAD])}
        return Contribution({DELTA: reply.change(round, start=head).arrays})

    def zero(self, sent: Arrays) -> Contribution:
        """Return no change of the head."""
        return no_change(self.head(sent), self.scalars, weighs=self.declares_weight)

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        own = "the last layer" if self._head is None else self._head
        return {"Head": own, **super().settings()}
