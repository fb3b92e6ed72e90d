"""Strategies whose server has several models."""

from typing import ClassVar, Unpack

from flower_ext.core.arrays import Arrays
from flower_ext.core.errors import refuse, whole
from flower_ext.core.protocol import Config, Round
from flower_ext.core.several import find_ties_of_several, require_models
from flower_ext.core.ties import Ties
from flower_ext.server.options import AdditiveOptions
from flower_ext.server.personal import PersonalStrategy


class SeveralModels(PersonalStrategy):
    """A strategy whose arrays are those of several models, ``0/...``, ``1/...``.

    Parameters
    ----------
    num_models : int
        At least 1, and fewer than there are clients, unless it is 1.
    *flowers, **options
        See :class:`~flower_ext.server.options.AdditiveOptions`.

    Raises
    ------
    ValueError
        Before the first round, if there are as many models as clients, or the initial
        arrays are not so many models.
    """

    #: What the number of models is called.
    number: ClassVar[str] = "num_models"
    #: What it means if there are as many as clients.
    too_many: ClassVar[str] = ""

    def __init__(
        self, num_models: int, *flowers: object, **options: Unpack[AdditiveOptions]
    ) -> None:
        self.num_models = whole(self.number, num_models, 1)
        super().__init__(*flowers, **options)

    def tell(self, round: Round) -> Config:
        """Look at the models before clients are told of them; tell nothing."""
        require_models(round.sent, self.num_models, self.number)
        if self.too_many and 1 < self.num_models >= round.population:
            refuse(
                self.number,
                self.num_models,
                f"< {round.population} clients",
                self.too_many,
            )
        return {}

    def find_ties(self, sent: Arrays) -> Ties:
        """Return the ties within each of the models, which may start alike."""
        return find_ties_of_several(sent)
