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

import json
import zlib
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from logging import WARNING
from typing import Literal, Unpack, cast, get_args

import numpy as np
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    ConfigRecordValues,
    Context,
    Message,
    MessageType,
    RecordDict,
)
from flwr.common import NDArray
from torch import Tensor, nn

from flower_ext._flower import log
from flower_ext.client.app import Mod
from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.task import tied_names
from flower_ext.core.arrays import (
    Arrays,
    all_finite,
    from_record,
    is_averaged,
    subtract,
    to_record,
)
from flower_ext.core.contribution import DELTA, Contribution, Total
from flower_ext.core.errors import fraction, one_of, refuse, whole
from flower_ext.core.protocol import ARRAYS_KEY, Config, Metrics, Payload, Reply, Round
from flower_ext.core.replies import MalformedReply, array_key, read_arrays
from flower_ext.core.schedules import Scheduled, value_in
from flower_ext.core.ties import TIED_KEY
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.drop_in import DropIn
from flower_ext.server.optimizers import TorchOptimizer
from flower_ext.server.options import AdditiveOptions
from flower_ext.wire.masks import Masks, Scope, first_ranks, top_k
from flower_ext.wire.sparse import decode, encode, is_sparse, received_masks, seal
from flower_ext.wire.value_codes import Precision

UPLOAD_DENSITY = "upload-density"
SCOPE = "mask-scope"
PRECISION = "value-precision"
FREEZE = "freeze-off-mask"
FEEDBACK = "error-feedback"
DENSE = "dense-arrays"
DESCRIPTION = "array-description"
RESIDUAL = "flasc-residual"

# Of names, shapes and dtypes: enough for 100,000 arrays.
_LONGEST_DESCRIPTION = 1 << 24

Aggregation = Literal["cohort", "senders"]


@dataclass(frozen=True)
class Tier:
    """What clients of one kind can take.

    Parameters
    ----------
    download_density, upload_density : float or callable, optional
        Instead of the strategy's.
    rank : int, optional
        The clients hold only the first ranks of every LoRA pair, and train no others;
        by default all of them.
    """

    download_density: Scheduled | None = None
    upload_density: Scheduled | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        for name in ("download_density", "upload_density"):
            if getattr(self, name) is not None:
                _density(name, getattr(self, name), 1)
        if self.rank is not None:
            whole("rank", self.rank, 1)


def _density(name: str, schedule: Scheduled, server_round: int) -> float:
    value = value_in(schedule, server_round)
    return fraction(name, value, "a share of the coordinates, 1 is all of them")


def _maskable(arrays: Mapping[str, NDArray], dense: Iterable[str]) -> Arrays:
    """Return the arrays of which a part may travel.

    One that holds an infinity, as masks of attention do, is no weight: it is whole.
    """
    words = list(dense)
    return {
        name: x
        for name, x in arrays.items()
        if is_averaged(x)
        and not any(word in name for word in words)
        and all_finite([x])
    }


def change(new: NDArray, old: NDArray) -> NDArray:
    """Return ``new - old``: floats in float32 or wider, all else in int64."""
    return subtract(new, old).numpy()


def _change_like(sent: Mapping[str, NDArray]) -> Arrays:
    """Return arrays with the shapes and dtypes of changes, which take no memory."""
    zeros = {name: np.zeros((), x.dtype) for name, x in sent.items()}
    return {
        name: np.broadcast_to(change(zeros[name], zeros[name]), x.shape)
        for name, x in sent.items()
    }


class FLASCClient(ClientHalf):
    """Trains densely from the sparse model, and sends the largest of what changed."""

    name = "flasc"

    def __init__(self) -> None:
        self._received: Arrays = {}
        self._frozen: Masks | None = None
        self._gradient_masks: dict[str, Tensor] = {}

    def begin(self, local: Local) -> None:
        """Keep what was received, which the change is measured from."""
        self._received = _state(local.model)
        masks = received_masks(local.model)
        if masks is not None and local.config.get(FREEZE, False):
            self._frozen = {name: mask.numpy() for name, mask in masks.items()}
            self._gradient_masks = {k: m.to(local.device) for k, m in masks.items()}

    def after_backward(self, model: nn.Module) -> None:
        """Keep frozen coordinates where they are."""
        if self._gradient_masks:
            for name, parameter in model.named_parameters():
                # Another name of tied numbers, which travel once, has no mask.
                if parameter.grad is not None and name in self._gradient_masks:
                    parameter.grad *= self._gradient_masks[name]

    def records(self, local: Local) -> tuple[Mapping[str, ArrayRecord], Metrics]:
        """Return the largest coordinates of the change, in the place of the model."""
        trained = _state(local.model)
        delta = {n: change(trained[n], x) for n, x in self._received.items()}
        tied = tied_names(local.model)
        record = _upload(delta, local.config, local.context.state, self._frozen, tied)
        return {ARRAYS_KEY: record}, {}


def _upload(
    delta: Arrays,
    config: ConfigRecord,
    state: RecordDict,
    within: Masks | None,
    tied: Collection[str] = (),
) -> ArrayRecord:
    """Return the largest coordinates of a client's change, as the server asked.

    Of a tensor with further names, ``tied``, only what is under the first travels.
    """
    delta = delta | {name: np.zeros_like(delta[name]) for name in tied}
    feedback = bool(config.get(FEEDBACK, False))
    if feedback and RESIDUAL in state:
        kept = from_record(state.array_records[RESIDUAL])
        delta = delta | {name: delta[name] + x for name, x in kept.items()}
    density = float(cast(float, config.get(UPLOAD_DENSITY, 1.0)))
    masks = within
    if density < 1:
        arrays = _maskable(delta, cast(Sequence[str], config.get(DENSE, [])))
        scope = cast(Scope, config.get(SCOPE, "global"))
        own = {name: x for name, x in arrays.items() if name not in tied}
        nothing = {name: np.zeros(delta[name].shape, np.bool_) for name in tied}
        masks = top_k(own, density, scope, within) | nothing
    record = encode(delta, masks, cast(Precision, config.get(PRECISION, "exact")))
    if feedback:
        sent, _ = decode(record, delta)
        with np.errstate(invalid="ignore"):
            left = {n: x - sent[n] for n, x in delta.items() if is_averaged(x)}
        # It would come back in every round: one that diverged starts anew.
        if all_finite(left.values()):
            state[RESIDUAL] = to_record(left)
        else:
            state.pop(RESIDUAL, None)
    return record


def _state(model: nn.Module) -> Arrays:
    return {
        name: x.detach().cpu().numpy().copy() for name, x in model.state_dict().items()
    }


def flasc() -> Mod:
    """Return a Flower mod that makes FLASC's clients of an app with its own loop.

    The app's functions stay as they are: they receive dense arrays, zero where nothing
    was sent, and reply with all that they trained; the mod sends the largest changes in
    its place, under the same key. Other messages, and those of other strategies, pass
    through. The strategy must describe its arrays, ``FLASC(describe_arrays=True)``.

    Returns
    -------
    callable
        For ``ClientApp(mods=[flasc()])``, or ``mods=[packed, flasc()]``.

    Notes
    -----
    ``client_freeze`` and tiers of rank are refused: what the loop does with gradients
    is not the mod's to say.
    """
    return _sparse_on_the_way


def _sparse_on_the_way(
    message: Message,
    context: Context,
    call_next: Callable[[Message, Context], Message],
) -> Message:
    content = message.content
    keys = [key for key, x in content.array_records.items() if is_sparse(x)]
    if not keys:
        return call_next(message, context)
    key = keys[0]
    config = _instructions(content)
    received, _ = decode(
        content.array_records[key], _described(cast(bytes, config[DESCRIPTION]))
    )
    message.content = RecordDict({**content, key: to_record(received)})
    try:
        reply = call_next(message, context)
    finally:
        message.content = content
    kind = message.metadata.message_type.partition(".")[0]
    if reply.has_content() and kind == MessageType.TRAIN:
        reply.content = _sparse_reply(
            reply.content, key, received, config, context.state
        )
    return reply


def _instructions(content: RecordDict) -> ConfigRecord:
    """Return what the server said of its sparse record, if the mod can follow it."""
    for config in content.config_records.values():
        if config.get(FREEZE, False):
            raise ValueError(
                "client_freeze and tiers of rank need FLASCClient, in client_app(task, "
                "FLASCClient): the mod flasc() cannot freeze what an app's loop trains"
            )
        if DESCRIPTION in config:
            return config
    raise ValueError(
        "the mod flasc() needs the names and shapes of the arrays: make the strategy "
        "with FLASC(describe_arrays=True)"
    )


def _sparse_reply(
    content: RecordDict,
    key: str,
    received: Arrays,
    config: ConfigRecord,
    state: RecordDict,
) -> RecordDict:
    """Return the content of an app's reply with the upload in the model's place."""
    key = array_key(content, key)
    trained = read_arrays(content, key, received)
    delta = {
        name: change(trained[name].astype(x.dtype, copy=False), x)
        for name, x in received.items()
    }
    tied = _alike(trained, received)
    for name, first in tied.items():  # the last that was loaded is where it began
        delta[first] = change(
            trained[name].astype(received[name].dtype), received[name]
        )
    content = RecordDict({**content, key: _upload(delta, config, state, None, tied)})
    if tied:
        content[TIED_KEY] = ConfigRecord({**tied})
    return content


def _alike(trained: Arrays, received: Arrays) -> dict[str, str]:
    """Return names of arrays that came back equal to an earlier one, and changed: ties.

    A mask may have cut the copies of what was sent apart.
    """
    groups: dict[object, list[str]] = {}
    for name, x in trained.items():
        if is_averaged(x) and x.size > 1:
            bits = blake2b(x.tobytes()).digest()
            groups.setdefault((x.dtype, x.shape, bits), []).append(name)
    return {
        name: names[0]
        for names in groups.values()
        if not all(np.array_equal(trained[n], received[n]) for n in names)
        for name in names[1:]
    }


def _describe(arrays: Mapping[str, NDArray]) -> bytes:
    """Write names, dtypes and shapes in few bytes."""
    text = json.dumps([[k, x.dtype.str, x.shape] for k, x in arrays.items()])
    return zlib.compress(text.encode(), 9)


def _described(data: bytes) -> Arrays:
    """Return arrays as they were described, which take no memory."""
    reader = zlib.decompressobj()
    text = reader.decompress(data, _LONGEST_DESCRIPTION)
    if not reader.eof:
        raise ValueError(f"a description must be <= {_LONGEST_DESCRIPTION} bytes")
    return {
        name: np.broadcast_to(np.zeros((), np.dtype(dtype)), shape)
        for name, dtype, shape in json.loads(text)
    }


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
        change (Seide et al. 2014); it keeps that in ``context.state``. For clients that
        are asked often: what is left out ages. What is kept is thrown away where it is
        not finite, so that a client that diverged starts anew. Not in the paper.
    eval_masked : bool (default: True)
        Clients evaluate what they would have received, the new weights under the
        round's mask, as the paper's code does; False sends all weights.
    dense : sequence of str
        Arrays with one of these words in their name always travel whole, as integers
        do. By default ``running_mean`` and ``running_var``, and ``modules_to_save``,
        the head of an :class:`~flower_ext.client.adapters.AdapterModel`. The paper's
        code masks the head, too: ``dense=()``; so will you if what you save is large,
        such as embeddings.
    describe_arrays : bool (default: False)
        Names and shapes go along, some hundred bytes a message, for apps that train in
        a loop of their own under the mod :func:`flasc`.
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
    =================  ==============================================================

    The last four are what the paper's code does under these names or, for FedSelect,
    our reading of it: a client holds and trains only the slice that it received.
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
        imports="from flower_ext.strategies.flasc import flasc",
        mod="flasc()",
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
        aggregation: Aggregation = "cohort",
        precision: Precision = "exact",
        error_feedback: bool = False,
        eval_masked: bool = True,
        dense: Sequence[str] = ("running_mean", "running_var", "modules_to_save"),
        describe_arrays: bool = False,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        options["server_optimizer"] = options.get("server_optimizer") or TorchOptimizer(
            partial(torch.optim.AdamW, lr=1e-3)
        )
        super().__init__(*flowers, **options)
        _density("download_density", download_density, 1)
        _density("upload_density", upload_density, 1)
        one_of("scope", scope, get_args(Scope))
        one_of("aggregation", aggregation, get_args(Aggregation))
        one_of("precision", precision, get_args(Precision))
        if fixed_mask_after is not None:
            whole("fixed_mask_after", fixed_mask_after, 0)
        if not tiers or not all(isinstance(tier, Tier) for tier in tiers):
            refuse("tiers", tiers, "a sequence of at least one Tier")
        if isinstance(dense, str):
            refuse("dense", dense, "a sequence of words", "write ('classifier',)")
        if self.mechanism is not None and aggregation == "senders":
            refuse(
                "aggregation",
                aggregation,
                "'cohort' with a mechanism",
                "who sent which coordinate depends on the data",
            )
        self.download_density = download_density
        self.upload_density = upload_density
        self.scope: Scope = scope
        self.client_freeze = client_freeze
        self.fixed_mask_after = fixed_mask_after
        self.tiers = tuple(tiers)
        self.tier_of = tier_of
        self.aggregation = aggregation
        self.precision: Precision = precision
        self.error_feedback = error_feedback
        self.eval_masked = eval_masked
        self.dense = tuple(dense)
        self.describe_arrays = describe_arrays
        # Of every tier: what clients received in this round, None for everything.
        self._masks: dict[int, Masks | None] = {}
        self._fixed: dict[int, Masks] = {}
        self._warned = False

    # What travels -----------------------------------------------------------------

    def tell(self, round: Round) -> Config:
        """Tell clients how to choose, and how to write, what they send."""
        return {
            SCOPE: self.scope,
            PRECISION: self.precision,
            FEEDBACK: self.error_feedback,
            DENSE: list(self.dense),
        }

    def variant(self, client: int, round: Round) -> int:
        """Return the tier of a client."""
        index = self.tier_of(client) if self.tier_of else client % len(self.tiers)
        if not 0 <= index < len(self.tiers):
            refuse(f"tier_of({client})", index, f"an index of {len(self.tiers)} tiers")
        return index

    def payload(self, variant: Hashable, round: Round) -> Payload:
        """Return a tier's part of the model."""
        index = cast(int, variant)
        tier = self.tiers[index]
        if round.phase == "train":
            self._masks[index] = self._choose(index, round)
        masks = self._masks.get(index)
        if round.phase == "evaluate" and not self.eval_masked:
            masks = None
        told: dict[str, ConfigRecordValues] = {
            UPLOAD_DENSITY: self._share("upload_density", tier, round.number),
            FREEZE: self.client_freeze or tier.rank is not None,
        }
        if self.describe_arrays:
            told[DESCRIPTION] = _describe(round.sent)
        return Payload(seal(encode(round.sent, masks, self.precision)), told)

    def masked(self, arrays: ArrayRecord, tier: int = 0) -> ArrayRecord:
        """Return a model as clients see it, for an ``evaluate_fn`` of the server.

        Parameters
        ----------
        arrays : ArrayRecord
            Dense weights.
        tier : int (default: 0)
            Whose mask of the last round is taken.
        """
        weights = from_record(arrays)
        masks = self._masks.get(tier) or {}
        return to_record(
            {
                k: np.where(masks[k], x, 0) if k in masks else x
                for k, x in weights.items()
            }
        )

    def _choose(self, index: int, round: Round) -> Masks | None:
        """Return the mask of a tier in a round."""
        server_round = round.number
        if index in self._fixed:
            return self._fixed[index]
        tier = self.tiers[index]
        arrays = {
            name: x
            for name, x in _maskable(round.sent, self.dense).items()
            if name not in round.ties
        }
        within = None if tier.rank is None else first_ranks(arrays, tier.rank)
        fixed = self.fixed_mask_after
        density = self._share("download_density", tier, server_round)
        if density >= 1 or (fixed is not None and server_round <= fixed):
            return within
        masks = top_k(arrays, density, self.scope, within)
        if density > 0 and not self._warned:
            self._warn_of_empty(masks, server_round)
        masks |= {k: masks[first] for k, first in round.ties.items() if first in masks}
        if fixed is not None:
            self._fixed[index] = masks
        return masks

    def _warn_of_empty(self, masks: Masks, server_round: int) -> None:
        empty = [name for name, mask in masks.items() if mask.size and not mask.any()]
        if empty:
            self._warned = True
            log(
                WARNING,
                "round %s: nothing of %s of %s arrays is sent, such as %s: clients see "
                "zeros there until they are among the largest. scope='tensor' sends a "
                "part of each array, dense=(word, ...) all of those named so",
                server_round,
                len(empty),
                len(masks),
                empty[0],
            )

    def _share(self, name: str, tier: Tier, server_round: int) -> float:
        own: Scheduled | None = getattr(tier, name)
        schedule: Scheduled = getattr(self, name) if own is None else own
        return _density(name, schedule, server_round)

    # What comes back --------------------------------------------------------------

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        r"""Return :math:`\Delta_k`; a client without examples has no weight."""
        key = array_key(reply.content, self.arrayrecord_key)
        record = reply.content.array_records.get(key)
        if record is None:
            raise MalformedReply(
                f"no ArrayRecord {self.arrayrecord_key!r} in the reply"
            )
        delta, masks = decode(record, _change_like(round.sent))
        senders = {DELTA: masks} if self.aggregation == "senders" else {}
        return Contribution({DELTA: delta}, counts=senders)

    def report(self, total: Total, round: Round) -> Metrics:
        """Return the densities of the round."""
        return {
            f"{way}-density": self._share(f"{way}_density", Tier(), round.number)
            for way in ("download", "upload")
        }

    # The run ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, object]:
        """Return what crosses rounds, a mask that is fixed among it."""
        fixed = {
            str(i): {name: mask.astype(np.uint8) for name, mask in masks.items()}
            for i, masks in self._fixed.items()
        }
        return {**super().state_dict(), "fixed-masks": fixed}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue where a run with the same settings was saved."""
        super().load_state_dict(state)
        saved = cast(Mapping[str, Mapping[str, NDArray]], state["fixed-masks"])
        self._fixed = {
            int(i): {name: mask.astype(np.bool_) for name, mask in masks.items()}
            for i, masks in saved.items()
        }

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        return {
            "Download density": self.download_density,
            "Upload density": self.upload_density,
            "Masks": f"{self.scope}, fixed after round {self.fixed_mask_after}"
            if self.fixed_mask_after is not None
            else self.scope,
            "Clients train": "what they received" if self.client_freeze else "all",
            "Tiers": self.tiers,
            "Divided by": self.aggregation,
            "Values": self.precision
            + (", with error feedback" if self.error_feedback else ""),
            **super().settings(),
        }
