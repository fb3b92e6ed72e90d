"""Strategies that average a part of the model; the rest stays with the clients."""

from collections.abc import Hashable
from typing import Unpack, cast

from flower_ext.core.arrays import Arrays, is_averaged
from flower_ext.core.contribution import DELTA, Contribution, no_change
from flower_ext.core.errors import refuse
from flower_ext.core.parts import (
    PERSONAL_NAMES,
    PERSONAL_PLACES,
    PERSONAL_START,
    Filter,
    personal_names,
    refuse_all,
    require_filter,
)
from flower_ext.core.protocol import Config, Payload, Reply, Round
from flower_ext.core.ties import equal_in_model
from flower_ext.server.options import AdditiveOptions
from flower_ext.server.personal import PersonalStrategy


class PartlyPersonal(PersonalStrategy):
    """Federated averaging of the arrays that clients share.

    The base of strategies whose clients keep a part of the model, with a half derived
    from :class:`~flower_ext.client.parts.PartlyPersonalClient`. Personal arrays are
    never sent to the server, whose own stay what they are in the initial model. They
    are sent to a client until it has first answered, and then no more, but where a
    mechanism keeps secret who has.

    Parameters
    ----------
    personal : str, sequence of str or callable, optional
        Which arrays stay with the clients, see
        :func:`~flower_ext.core.parts.personal_names`.
    *flowers, **options
        See :class:`~flower_ext.server.options.AdditiveOptions`.
    """

    def __init__(
        self,
        *flowers: object,
        personal: Filter = None,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(*flowers, **options)
        # Of the server alone: a function need not be picklable.
        self._personal = require_filter(personal)

    def personal_names(self, sent: Arrays) -> list[str]:
        """Return the names of the personal arrays of a model.

        Raises
        ------
        ValueError
            If they are none or all, or if one tensor is both personal and shared.
        """
        found = personal_names(sent, self._personal)
        own = set(found)
        if not any(is_averaged(x) for name, x in sent.items() if name not in own):
            refuse_all(self._personal, list(sent))
        for name, first in equal_in_model(sent).items():
            if (name in own) != (first in own):
                refuse(
                    "personal",
                    self._personal,
                    f"a filter that matches both {first!r} and {name!r}, or none",
                    "they are equal in the initial model, as one tensor with two names "
                    "is. If they only start alike, start them apart",
                )
        return found

    def tell(self, round: Round) -> Config:
        """Tell clients which arrays are their own."""
        names, order = self.personal_names(round.sent), list(round.sent)
        places = [order.index(name) for name in names]
        return {PERSONAL_NAMES: names, PERSONAL_PLACES: places}

    def variant(self, client: int, round: Round) -> Hashable:
        """Return whether a client has personal arrays of its own."""
        return client in round.answered

    def payload(self, variant: Hashable, round: Round) -> Payload:
        """Send what is shared, and to new clients what is personal beside it."""
        names = _told(round)
        start = {name: round.sent[name] for name in names}
        beside = {} if variant else {PERSONAL_START: start}
        return Payload(_without(round.sent, names), beside=beside)

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        """Return the change of the shared arrays."""
        shared = _without(round.sent, _told(round))
        return Contribution({DELTA: reply.change(round, start=shared).arrays})

    def zero(self, sent: Arrays) -> Contribution:
        """Return no change of the shared arrays."""
        shared = _without(sent, self.personal_names(sent))
        return no_change(shared, self.scalars, weighs=self.declares_weight)

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        own = "the last layer" if self._personal is None else self._personal
        return {"Personal arrays": own, **super().settings()}


def _told(round: Round) -> list[str]:
    return cast("list[str]", round.told[PERSONAL_NAMES])


def _without(arrays: Arrays, names: list[str]) -> Arrays:
    own = set(names)
    return {name: x for name, x in arrays.items() if name not in own}
