r"""FedPer: clients share the body of a model, and each keeps a head of its own.

Arivazhagan, Aggarwal, Singh and Choudhary 2019, "Federated learning with
personalization layers", arXiv 1912.00818.
"""

from flower_ext.client.parts import PartlyPersonalClient
from flower_ext.server.drop_in import DropIn
from flower_ext.server.parts import PartlyPersonal


class FedPerClient(PartlyPersonalClient):
    """Trains body and head together, sends the body and keeps the head."""

    name = "fedper"


class FedPer(PartlyPersonal):
    r"""Federated averaging of a model's body under heads of the clients' own.

    Against FedAvg, the arrays are split into shared ones :math:`u` and personal ones
    :math:`v_k`. A client trains :math:`(u, v_k)` as a whole, keeps :math:`v_k` and
    sends the change of :math:`u`, which alone is averaged:

    .. math::
       (u_k, v_k) \leftarrow \mathrm{SGD}(u, v_k), \qquad
       u \leftarrow u + \frac{\sum_k n_k (u_k - u)}{\sum_k n_k}.

    With nothing personal it would be FedAvg, with nothing shared local training. Works
    with the client half :class:`FedPerClient`, or with the mod
    :func:`~flower_ext.client.parts.keep_at_home` around a loop of one's own.

    Parameters
    ----------
    personal : str, sequence of str or callable, optional
        Which arrays stay with the clients: patterns of names such as ``"head.*"``, as
        of :mod:`fnmatch`, or a function ``name -> bool``. By default the model's last
        layer.
    *flowers, **options
        Server optimizer, sampler, mechanism, codecs and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Raises
    ------
    ValueError
        If a pattern matches no array, if the filter matches all, or if one tensor is
        both shared and personal, such as an output layer tied to an embedding; in
        ``configure_train``, before a client is asked.

    Notes
    -----
    Personal arrays never travel to the server; to a client they do until it has first
    answered, and in every round where a mechanism keeps secret who takes part. The
    server's own stay those of the initial model: a client that was never asked to
    train, also one that evaluates only, has this fresh head, and the result of the run,
    its ``arrays``, too. A client that has lost its state goes on with a head that
    ``Task.model`` makes; one with the mod fails and says so.

    Revealed is the change of the shared arrays, from which much of a client's data can
    be inferred as with FedAvg. Under a mechanism they are clipped and noised; what
    stays at home needs no noise, and gets none. A client half of a strategy follows the
    server's filter, the mod that of the client. Metrics of an evaluation are of each
    client's own model, see :class:`~flower_ext.server.personal.PersonalStrategy`.

    Examples
    --------
    >>> strategy = FedPer(personal="head.*", fraction_train=0.1)
    """

    client_half = FedPerClient
    drop_in = DropIn(
        imports="from flower_ext.client.parts import keep_at_home",
        mod="keep_at_home()",
    )
