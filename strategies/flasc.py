r"""FLASC: federated LoRA with sparse communication.

The server keeps dense weights :math:`P`. In a round it sends the part of them that is
largest in magnitude; clients train all coordinates from there and send back the part of
their change that is largest:

.. math::
   W_0 = P \odot \mathrm{top}_d(|P|), \quad
   \Delta_k = (W_k - W_0) \odot \mathrm{top}_u(|W_k - W_0|), \quad
   P \leftarrow \mathrm{ServerOpt}\Bigl(P, \tfrac{1}{m}\sum_k \Delta_k\Bigr)

(Kuo, Liu, Rastogi, Smith et al. 2024, "Federated LoRA with Sparse Communication",
arXiv:2406.05233, as in its published code.) Weights outside the mask stay on the server
as they are, and come back once they are among the largest.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from logging import WARNING
from typing import Literal, Unpack, cast, get_args

import torch
from flwr.app import ArrayRecord
from torch import nn

from flower_ext._flower import log
from flower_ext.client.half import ClientHalf, Local
from flower_ext.core.arrays import Arrays, from_record, to_record
from flower_ext.core.contribution import DELTA, Contribution, Total
from flower_ext.core.errors import one_of, refuse, whole
from flower_ext.core.protocol import Metrics, Reply, Round
from flower_ext.core.schedules import Scheduled
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.drop_in import DropIn
from flower_ext.server.optimizers import TorchOptimizer
from flower_ext.server.options import AdditiveOptions
from flower_ext.wire import Chain, Codec, Described, ErrorFeedback, FixedMask, Sending
from flower_ext.wire.chain import TopK, density_in, words
from flower_ext.wire.masks import Masks, Ranks, Scope, rank_masks
from flower_ext.wire.value_codes import VALUE_CODES, Precision

Aggregation = Literal["cohort", "senders"]

_EMPTY = (
    "round %s: nothing of %s of %s arrays is sent, such as %s: clients see zeros there "
    "until they are among the largest. scope='tensor' sends a part of each array, "
    "dense=(word, ...) all of those named so"
)


@dataclass(frozen=True)
class Tier:
    """What clients of one kind can take.

    Parameters
    ----------
    download_density, upload_density : float or callable, optional
        Instead of the strategy's.
    rank : int, optional
        The clients hold only so many ranks of every LoRA pair, which ``ranks`` chooses,
        and train no others; by default all of them.
    """

    download_density: Scheduled | None = None
    upload_density: Scheduled | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        for name in ("download_density", "upload_density"):
            if getattr(self, name) is not None:
                density_in(name, getattr(self, name), 1)
        if self.rank is not None:
            whole("rank", self.rank, 1)


class FLASCClient(ClientHalf):
    """Trains from the sparse model: all of it, or what it received of it.

    What it sends back is chosen by the codec of its upload.
    """

    name = "flasc"
    post_processing = True

    def begin(self, local: Local) -> None:
        """Keep the masks of what was received, where nothing else may be trained."""
        frozen = local.upload is not None and local.upload.within_received
        own = (local.masks or {}) if frozen else {}
        self._masks = {k: torch.from_numpy(m).to(local.device) for k, m in own.items()}

    def after_backward(self, model: nn.Module) -> None:
        """Keep frozen coordinates where they are."""
        for name, parameter in model.named_parameters():
            # Another name of tied numbers, which travel once, has no mask.
            if parameter.grad is not None and name in self._masks:
                parameter.grad *= self._masks[name]


class FLASC(AdditiveStrategy):
    r"""Federated fine-tuning of which a part of the coordinates travels.

    Against FedAvg: clients receive the part of the weights largest in magnitude, and
    return the part of their change largest in magnitude, counted from what they
    received. All clients that have examples weigh the same. Made for adapters
    (:class:`~flower_ext.client.adapters.AdapterModel`), whose untouched coordinates are
    nearly zero; a whole network loses most of its weights to the mask.

    Parameters
    ----------
    download_density : float or callable (default: 0.25)
        Share of the coordinates that are sent, or ``server_round -> share``, such as
        :class:`~flower_ext.core.schedules.Decay`. 1 sends the whole model; 0 none of
        it, and all above at least one coordinate of what ``scope`` chooses from.
    upload_density : float or callable (default: 0.25)
        Share of the coordinates that clients return; 1 is the whole change.
    scope : {"global", "tensor"}
        Whether the largest are chosen over all arrays together, as in the paper's code,
        or in each. Together, arrays compete: of a new adapter the random ``lora_A``
        travels and nothing of ``lora_B``, which is zero, until it has grown; a head of
        small weights is masked out, after which no gradient reaches the adapters. That
        nothing of an array travels is said once, in the log.
    client_freeze : bool (default: False)
        Clients train only what they received.
    fixed_mask_after : int, optional
        That many rounds send the whole model; then the mask is chosen once and for all.
        By default it is chosen anew in every round.
    tiers : sequence of Tier
        Kinds of clients that differ in densities or ranks.
    tier_of : callable, optional
        ``client -> index of its tier``, where the client is its place among the nodes
        (in a simulation its partition); by default ``client % len(tiers)``.
    ranks : {"first", "pair", "factor"}
        Which ranks a tier of fewer holds. The first, always the same, as HetLoRA; those
        of the largest singular value of their term, the product of the norms of a
        column of B and a row of A; or in each factor those largest in norm, as the
        paper's code does under the name ``rankl1``: what a tier holds of A may then
        have no partner in B. The latter two are chosen anew in every round. With
        ``server_optimizer=RefactoredSGD()`` the first are those of the largest singular
        values of the whole product.
    aggregation : {"cohort", "senders"}
        What the sum of the changes is divided by. The default is the cohort: a change
        that was not sent counts as none. That is what dropping small coordinates
        means, and the only one that a mechanism can have. ``senders`` divides each
        coordinate by the number of clients that sent it: right for tiers of rank, where
        a client that lacks a rank has no opinion on it; under top-k it overrates
        coordinates that few clients found large.
    precision : {"exact", "bfloat16", "nf4"}
        How values travel, both ways.
    error_feedback : bool (default: False)
        A client adds what its upload left out, by choice or by rounding, to its next
        change, see :class:`~flower_ext.wire.wrappers.ErrorFeedback`. Not in the paper.
    eval_masked : bool (default: True)
        Clients evaluate what they would have received, the new weights under the
        round's mask, as the paper's code does; False sends all weights.
    dense : sequence of str
        Arrays with one of these words in their name always travel whole, as integers
        do. By default ``running_mean`` and ``running_var``, and ``modules_to_save``,
        the head of an :class:`~flower_ext.client.adapters.AdapterModel`. The paper's
        code masks the head, too: ``dense=()``; so will you if what you save is large,
        such as embeddings.
    upload_dense : sequence of str, optional
        The same for uploads alone, where ``dense`` is then of downloads alone; by
        default the same words. With ``()`` the changes of all arrays compete, as the
        paper's code has it for tiers of density: a head travels whole down and masked
        up.
    describe_arrays : bool (default: False)
        Names and shapes go along, some hundred bytes a message, for apps that train in
        a loop of their own under the mod
        :func:`~flower_ext.client.encoding.encoded`.
    server_optimizer : ServerOptimizer, optional
        By default that of the paper's code, ``torch.optim.AdamW`` with ``lr=1e-3`` and
        all else as torch has it, a weight decay of 0.01 among it.
    *flowers, **options
        Sampler, mechanism and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`. Under a mechanism the
        change is clipped as it arrives, after its coordinates were chosen, and the
        noise is dense; the masks sent down are post-processing.

    Notes
    -----
    The paper compares with methods that are settings of the same code:

    =================  ==============================================================
    dense LoRA         ``download_density=1, upload_density=1``; of a lower rank with
                       a smaller ``LoraConfig(r=...)``
    full fine-tuning   the same with ``AdapterModel(..., "all")``, and a linear probe
                       with ``"head"``
    FFA-LoRA           the same with ``AdapterModel(..., frozen=("lora_A",))``
    SparseAdapter      ``download_density=d, upload_density=1, client_freeze=True,
                       fixed_mask_after=1``
    Adapter-LTH        ``download_density=Decay(1, 0.9), upload_density=1,
                       client_freeze=True``
    FedSelect          ``download_density=d, upload_density=1, client_freeze=True``
    HetLoRA            ``download_density=1, upload_density=1``, and tiers of rank
    ``rankl1``         the same with ``ranks="factor"``
    tiers of density   ``tiers=[Tier(d, d) for d in (1/16, 1/4, 1)], upload_dense=()``
    =================  ==============================================================

    From SparseAdapter on they are what the paper's code does under these names or, for
    FedSelect, our reading of it: a client holds and trains only the slice that it
    received. With tiers of rank that is always so; the code does it with
    ``client_freeze`` only, and otherwise lets clients train ranks that start from zero.
    HetLoRA's own pruning and its weights by norm are not in it.

    Train metrics ``download-density`` and ``upload-density`` are those of the round,
    tiers apart. Clients without examples count neither in the sum nor in what it is
    divided by; the paper's code counts them in the latter.

    Examples
    --------
    >>> strategy = FLASC(download_density=1 / 4, upload_density=1 / 16)
    """

    client_half = FLASCClient
    equal_weights = True
    drop_in = DropIn(
        imports="from flower_ext.client.encoding import encoded",
        mod="encoded()",
        arguments=lambda num_clients: {"describe_arrays": True},
        written="describe_arrays=True",
    )

    def __init__(
        self,
        *flowers: object,
        download_density: Scheduled = 0.25,
        upload_density: Scheduled = 0.25,
        scope: Scope = "global",
        client_freeze: bool = False,
        fixed_mask_after: int | None = None,
        tiers: Sequence[Tier] = (Tier(),),
        tier_of: Callable[[int], int] | None = None,
        ranks: Ranks = "first",
        aggregation: Aggregation = "cohort",
        precision: Precision = "exact",
        error_feedback: bool = False,
        eval_masked: bool = True,
        dense: Sequence[str] = ("running_mean", "running_var", "modules_to_save"),
        upload_dense: Sequence[str] | None = None,
        describe_arrays: bool = False,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        adam = TorchOptimizer(partial(torch.optim.AdamW, lr=1e-3))
        options["server_optimizer"] = options.get("server_optimizer") or adam
        super().__init__(*flowers, **options)
        density_in("download_density", download_density, 1)
        density_in("upload_density", upload_density, 1)
        one_of("ranks", ranks, get_args(Ranks))
        one_of("aggregation", aggregation, get_args(Aggregation))
        one_of("precision", precision, get_args(Precision))
        if fixed_mask_after is not None:
            whole("fixed_mask_after", fixed_mask_after, 0)
            if not self.server_optimizer.keeps_coordinates:
                bound = f"None under {self.server_optimizer!r}"
                refuse("fixed_mask_after", fixed_mask_after, bound)
        if not tiers or not all(isinstance(tier, Tier) for tier in tiers):
            refuse("tiers", tiers, "a sequence of at least one Tier")
        if self.mechanism is not None and aggregation == "senders":
            cause = "who sent which coordinate depends on the data"
            refuse("aggregation", aggregation, "'cohort' with a mechanism", cause)
        self.densities = {"download": download_density, "upload": upload_density}
        down = TopK(1.0, scope, dense)
        up = words("upload_dense", dense if upload_dense is None else upload_dense)
        self.chooses = {"download": down, "upload": replace(down, dense=up)}
        self.client_freeze = client_freeze
        self.fixed_mask_after = fixed_mask_after
        self.tiers = tuple(tiers)
        self.tier_of = tier_of
        self.ranks: Ranks = ranks
        self.aggregation = aggregation
        self.precision: Precision = precision
        self.error_feedback = error_feedback
        self.eval_masked = eval_masked
        self.describe_arrays = describe_arrays
        # Of every tier what clients of this round receive, None for everything, and
        # the model that it was chosen of.
        self._masks: dict[int, Masks | None] = {}
        self._masked: Arrays | None = None
        self._fixed: dict[int, Masks] = {}
        self._warned = False

    # What travels -----------------------------------------------------------------

    def variant(self, client: int, round: Round) -> int:
        """Return the tier of a client."""
        index = self.tier_of(client) if self.tier_of else client % len(self.tiers)
        if not 0 <= index < len(self.tiers):
            refuse(f"tier_of({client})", index, f"an index of {len(self.tiers)} tiers")
        return index

    def download_codec(self, variant: Hashable, round: Round) -> Codec:
        """Return a tier's mask: that of the round, in its evaluation too."""
        training = round.phase == "train"
        # Tiers that train nobody in this round may evaluate in it.
        if training and self._masked is not round.sent:
            self._masks = {i: self._choose(i, round) for i in range(len(self.tiers))}
            self._masked = round.sent
        seen = training or self.eval_masked
        masks = self._masks.get(cast(int, variant)) if seen else None
        codec = Chain(FixedMask(masks or {}), VALUE_CODES[self.precision])
        return Described(codec) if self.describe_arrays else codec

    def upload_codec(self, variant: Hashable, round: Round) -> Codec:
        """Return how a tier chooses, and writes, the largest of its change."""
        tier = self.tiers[cast(int, variant)]
        chooses = replace(
            self.chooses["upload"],
            density=self._density("upload", tier, round.number),
            within_received=self.client_freeze or tier.rank is not None,
        )
        codec = Chain(chooses, VALUE_CODES[self.precision])
        return ErrorFeedback(codec) if self.error_feedback else codec

    def masked(self, arrays: ArrayRecord, tier: int = 0) -> ArrayRecord:
        """Return a model as clients see it, for an ``evaluate_fn`` of the server.

        Parameters
        ----------
        arrays : ArrayRecord
            Dense weights.
        tier : int (default: 0)
            Whose mask of the last round is taken.
        """
        weights, mask = from_record(arrays), FixedMask(self._masks.get(tier) or {})
        return to_record(mask.decode(mask.encode(weights), weights))

    def _choose(self, index: int, round: Round) -> Masks | None:
        """Return the mask of a tier in a round."""
        if index in self._fixed:
            return self._fixed[index]
        tier, fixed = self.tiers[index], self.fixed_mask_after
        density = self._density("download", tier, round.number)
        chooses = self.chooses["download"]
        maskable = chooses.maskable(round.sent)
        own = {n: x for n, x in maskable.items() if n not in round.ties}
        within = None if tier.rank is None else rank_masks(own, tier.rank, self.ranks)
        if density >= 1 or (fixed is not None and round.number <= fixed):
            return within
        known = Sending(tied=round.ties, received=within)
        chooses = replace(chooses, density=density, within_received=True)
        masks = chooses.choose(round.sent, known)
        empty = [name for name, mask in masks.items() if mask.size and not mask.any()]
        if empty and density > 0 and not self._warned:
            self._warned = True
            log(WARNING, _EMPTY, round.number, len(empty), len(masks), empty[0])
        if fixed is not None:
            self._fixed[index] = masks
        return masks

    def _density(self, way: str, tier: Tier, server_round: int) -> float:
        own: Scheduled | None = getattr(tier, f"{way}_density")
        schedule = self.densities[way] if own is None else own
        return density_in(f"{way}_density", schedule, server_round)

    # What comes back --------------------------------------------------------------

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        r"""Return :math:`\Delta_k`, and who sent which coordinate where that counts."""
        change, masks = reply.change(round)
        counts = {DELTA: masks} if masks and self.aggregation == "senders" else {}
        return Contribution({DELTA: change}, counts=counts)

    def report(self, total: Total, round: Round) -> Metrics:
        """Return the densities of the round."""
        return {
            f"{way}-density": self._density(way, Tier(), round.number)
            for way in self.densities
        }

    # The run ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, object]:
        """Return what crosses rounds, a mask that is fixed among it."""
        fixed = {str(index): dict(masks) for index, masks in self._fixed.items()}
        return {**super().state_dict(), "fixed-masks": fixed}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue where a run with the same settings was saved."""
        super().load_state_dict(state)
        saved = cast(Mapping[str, Masks], state["fixed-masks"])
        self._fixed = {int(index): dict(masks) for index, masks in saved.items()}

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        return {
            "Download density": self.densities["download"],
            "Upload density": self.densities["upload"],
            "Scope": self.chooses["download"].scope,
            "Dense arrays": {way: x.dense for way, x in self.chooses.items()},
            "Masks fixed after round": self.fixed_mask_after,
            "Clients train": "what they received" if self.client_freeze else "all",
            "Tiers": self.tiers,
            "Ranks of tiers": self.ranks,
            "Divided by": self.aggregation,
            "Values": self.precision,
            "Error feedback": self.error_feedback,
            **super().settings(),
        }
