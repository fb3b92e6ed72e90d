"""Hugging Face models as tasks: only what is trained is sent, the rest is shared.

:class:`AdapterModel` makes the model of a :class:`~flower_ext.Task` from a folder on
disk. Its ``state_dict`` and ``load_state_dict`` know the trained parameters only, those
of an adapter and of the task's head, so that clients and strategies work with it as
with any other model. The base is read once in a process; the models of all virtual
clients share its frozen tensors. Nothing is ever asked of a hub.

Needs the packages transformers and peft: ``pip install "flower-ext[lora]"``.
"""

import json
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from io import BytesIO
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from flwr.app import ArrayRecord, Context, UserConfig
from torch import Tensor, nn

from flower_ext.client.lora import change_base
from flower_ext.client.task import (
    Batch,
    LocalOptimizer,
    MakeOptimizer,
    Task,
    is_stacking,
)
from flower_ext.core.errors import one_of, refuse, whole
from flower_ext.core.lora import RANK_KEY, split_base

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase

Kind = Literal["classification", "causal-lm", "question-answering"]

_AUTO_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "question-answering": "AutoModelForQuestionAnswering",
}
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")
_IGNORED = -100  # label of a token that is not predicted, as in transformers

# What this process has read already: bases, and models ready to be copied for a client.
_bases: dict[str, "_Base"] = {}
_models: dict[str, "_Template"] = {}


@dataclass
class _Base:
    """A model as it is on disk, and the names of parameters that are not on disk.

    These are drawn at random. ``random_state`` is torch's state after that: an adapter
    is drawn from it, and so is the same whether the base was just read or long before.
    """

    model: nn.Module
    new: set[str]
    random_state: Tensor


@dataclass(frozen=True)
class AdapterModel:
    """A pretrained model of which a part is trained: what ``Task.model`` takes.

    Every call returns a new model whose frozen tensors are those of the base. An
    adapter that changes weights of the base (OLoRA, PiSSA) has its own copies of these.
    Do not merge an adapter into such a model, which would change the base of all
    others: save it, and merge it into what peft loads.

    Parameters
    ----------
    folder : path
        A model as transformers saves it: ``config.json`` and the weights.
    trains : PeftConfig, path, "head" or "all"
        What is trained and sent: the adapter that a peft configuration describes, such
        as ``LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")``
        (with that ``task_type`` the head too, otherwise the ``modules_to_save``); an
        adapter that peft saved in a folder; the task's head alone (a linear probe); or
        everything (full fine-tuning). Of P-tuning, and of prefixes with a projection,
        peft saves the prompts alone: they cannot be trained further.
    kind : {"classification", "causal-lm", "question-answering"}
        Which head the model has; the last one's marks the answer in the text.
    num_labels : int (default: 2)
        Classes, for classification.
    frozen : tuple of str
        Parameters with one of these words between the dots of their name are not
        trained and not sent: ``("lora_A",)`` is FFA-LoRA (Sun, Li, Li and Ding 2024).
    seed : int (default: 0)
        Adapter and head are drawn with it, and so are the same in every process.

    Raises
    ------
    ValueError
        When called: if the folder is incomplete; the target modules match nothing;
        nothing is trained; weights that are not in the folder, and therefore random,
        would stay as they are; the model does not run with the prompts of the adapter;
        or the adapter changes the base at random, as ``pissa_niter_4`` does.
    ImportError
        Without transformers or peft.

    Examples
    --------
    >>> from peft import LoraConfig  # doctest: +SKIP
    >>> model = AdapterModel(
    ...     "minilm", LoraConfig(r=8, target_modules=["query"], task_type="SEQ_CLS")
    ... )  # doctest: +SKIP
    >>> strategy.start(grid, ArrayRecord(model({}).state_dict()))  # doctest: +SKIP
    """

    folder: Path | str
    trains: "PeftConfig | Path | str"
    kind: Kind = "classification"
    num_labels: int = 2
    frozen: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("kind", self.kind, tuple(_AUTO_CLASSES))
        whole("num_labels", self.num_labels, 1)
        whole("seed", self.seed, 0)
        if isinstance(self.frozen, str):
            refuse("frozen", self.frozen, "a tuple of words", "write ('lora_A',)")

    def __call__(self, run_config: UserConfig) -> nn.Module:
        """Return a new model with the initial parameters.

        The key ``"lora-rank"`` of ``run_config``, if there is one, is the rank of a new
        LoRA adapter, in the place of that of its configuration.
        """
        rank = run_config.get(RANK_KEY)
        model = self if rank is None else self._of_rank(int(rank))
        key = model._key()
        if key not in _models:
            _models[key] = _Template(model._build(), buffers=model.trains == "all")
        return _models[key].copy()

    def save(self, arrays: ArrayRecord, folder: Path | str) -> None:
        """Save a trained model: what plain peft, or transformers, loads again.

        Parameters
        ----------
        arrays : ArrayRecord
            The result of a run; of one that changes the base, with these changes, as
            ``strategy.whole(result.arrays)`` has them.
        folder : path
            Receives the adapter and head, or the whole model if no adapter is trained.
            Where the base has changed it is saved in ``folder/base``, and that is what
            peft must put the adapter on.
        """
        model = self({})
        own, base = split_base(arrays.to_torch_state_dict())
        if base:
            self._save_base(base, Path(folder).expanduser() / "base")
        model.load_state_dict(own)
        # Tied parameters under all of their names: peft may look for any of them.
        parameters = model.named_parameters(remove_duplicate=False)
        state = {name: p.detach() for name, p in parameters}
        state |= dict(model.named_buffers(remove_duplicate=False))
        options = {"state_dict": state} if self._adapter is not None else {}
        if self._adapter is None:
            model = self._without_hooks(state)
        model.save_pretrained(str(folder), **options)  # type: ignore[operator]

    def _save_base(self, base: Mapping[str, Tensor], folder: Path) -> None:
        init = getattr(self.trains, "init_lora_weights", True)
        if init not in (True, False, "gaussian", "orthogonal"):
            cause = "peft would change the base again when it loads the adapter"
            refuse("init_lora_weights", init, "True, to save a changed base", cause)
        model = self({})
        change_base(model, base)
        model.unload().save_pretrained(str(folder))  # type: ignore[operator]

    def _of_rank(self, rank: int) -> "AdapterModel":
        """Return the same with a LoRA adapter of another rank, if it has a new one."""
        if not hasattr(self.trains, "r"):
            return self
        config = deepcopy(self.trains)
        config.r = rank
        return replace(self, trains=config)

    @property
    def _adapter(self) -> "PeftConfig | Path | str | None":
        return None if self.trains in ("head", "all") else self.trains

    def _key(self) -> str:
        # All that the model is made from: equal keys share one template. A saved
        # adapter counts by its files, since it may be trained and saved again in its
        # folder.
        adapter: object = self.trains
        if not isinstance(adapter, Path | str):
            adapter = self.trains.to_dict()  # type: ignore[union-attr]
        elif self._adapter is not None:
            adapter = _stamp(Path(adapter).expanduser())
        plain = (adapter, self.frozen, self.seed)
        return self._base_key() + json.dumps(plain, default=_sorted, sort_keys=True)

    def _base_key(self) -> str:
        folder = _stamp(Path(self.folder).expanduser())
        return json.dumps([folder, self.kind, self.num_labels, self.seed])

    def _base(self) -> _Base:
        key = self._base_key()
        if key not in _bases:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                _bases[key] = _load(
                    Path(self.folder).expanduser(), self.kind, self.num_labels
                )
        return _bases[key]

    def _without_hooks(self, state: Mapping[str, Tensor]) -> nn.Module:
        model = deepcopy(self._base().model)
        model.load_state_dict(state, strict=False)
        return model

    def _build(self) -> nn.Module:
        base = self._base()
        if self._adapter is not None:
            model = self._adapted(base, self._adapter)
        else:
            model = _alias(base.model)
        # transformers names the module below the head; all else is the head.
        if self.trains == "head":
            body = f"{base.model.base_model_prefix}."
            for name, parameter in model.named_parameters():
                parameter.requires_grad = not name.startswith(body)
        for name, parameter in model.named_parameters():
            if not set(self.frozen).isdisjoint(name.split(".")):
                parameter.requires_grad = False
        self._check(model, base.new)
        return model

    def _adapted(self, base: _Base, adapter: "PeftConfig | Path | str") -> nn.Module:
        """Put an adapter on a copy of the base: OLoRA and PiSSA change its weights."""
        # Made a second time from another random state. A base that comes out
        # differently could not be restored when peft loads the trained adapter.
        model, changed = _with_adapter(base, adapter, base.random_state)
        if changed:
            other = torch.Generator().manual_seed(self.seed + 1).get_state()
            again = _with_adapter(base, adapter, other)[1]
            same = [torch.allclose(x, again[k], 0, 1e-5) for k, x in changed.items()]
            if not all(same):
                refuse(
                    "trains",
                    _short(adapter),
                    "an adapter that changes the base always alike, or not at all",
                    f"it begins with {min(changed)} changed at random, which peft "
                    "cannot repeat when it loads what was trained",
                )
        return model

    def _check(self, model: nn.Module, new: set[str]) -> None:
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        if not names:
            refuse("trains", self.trains, "something that leaves parameters to train")
        # What the folder lacks is random, and must be trained to be of any use.
        trained = [_plain(name) for name in names]
        random = {n for n in new if not any(t.endswith(f".{n}") for t in trained)}
        if random:
            raise ValueError(
                f"{sorted(random)[:4]} are not in {self.folder} and would stay random: "
                "add their module to modules_to_save, or train 'all'"
            )


def adapter_task(
    model: AdapterModel,
    data: Callable[[Context], tuple[Batch, Batch]],
    *,
    optimizer: MakeOptimizer | LocalOptimizer | None = None,
) -> Task:
    """Return the task of fine-tuning a model: what ``client_app`` takes.

    Parameters
    ----------
    model : AdapterModel
        The loss is the cross-entropy of its kind; ``accuracy`` is the metric.
    data : callable
        ``Context -> (train, test)``, each a dict of ``input_ids`` and
        ``attention_mask`` (and ``token_type_ids``), ``(examples, tokens)``; for
        classification ``labels``, and for question answering ``start`` and ``end``, the
        places that the head is to mark, ``(examples,)``.
    optimizer : callable, optional
        See :class:`~flower_ext.Task`.
    """
    loss, metrics = _LOSSES[model.kind]
    return Task(model, data, loss, metrics, optimizer)


def load_tokenizer(folder: Path | str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model's folder.

    Raises
    ------
    ValueError
        If the folder has none, or one with more tokens than the model knows.
    """
    transformers = _imported("transformers")
    folder = Path(folder).expanduser()
    _require_files(folder, ("config.json",), _TOKENIZERS)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True
        )
    except Exception as error:
        raise ValueError(
            f"the tokenizer in {folder} cannot be read: {error}"
        ) from error
    known = json.loads((folder / "config.json").read_text("utf-8")).get("vocab_size")
    if known is not None and len(tokenizer) > known:
        raise ValueError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, its model knows "
            f"{known}: they are not of the same model, or tokens were added"
        )
    found: PreTrainedTokenizerBase = tokenizer
    return found


# Losses ---------------------------------------------------------------------------


def _logits(model: nn.Module, batch: Batch, *, causal: bool = False) -> Tensor:
    inputs = {name: column for name, column in batch.items() if name != "labels"}
    mask = inputs.get("attention_mask")
    if mask is not None and is_stacking():
        # transformers looks whether anything is masked, unless the mask is its last.
        inputs["attention_mask"] = _added_mask(mask, causal, next(model.parameters()))
    logits: Tensor = model(**inputs).logits
    return logits


def _added_mask(mask: Tensor, causal: bool, like: Tensor) -> Tensor:
    """Return what is added to scores, of shape ``(examples, 1, 1 or time, time)``."""
    hidden = (mask == 0)[:, None, None, :]
    if causal:
        time = mask.shape[1]
        later = torch.ones(time, time, dtype=torch.bool, device=mask.device).triu(1)
        hidden = hidden | later
    added = torch.zeros(hidden.shape, dtype=like.dtype, device=mask.device)
    return added.masked_fill(hidden, torch.finfo(like.dtype).min)


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return each example's cross-entropy, in nats."""
    return nn.functional.cross_entropy(
        _logits(model, batch), batch["labels"], reduction="none"
    )


def classification_metrics(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return whether each example is classified right."""
    hits = _logits(model, batch).argmax(-1) == batch["labels"]
    return {"accuracy": hits.float()}


def _next_tokens(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits ``(examples, tokens, time)``, targets, and how many count."""
    # The logits at each token predict the one after it.
    targets = batch["input_ids"][:, 1:]
    if "attention_mask" in batch:
        targets = targets.masked_fill(batch["attention_mask"][:, 1:] == 0, _IGNORED)
    # Trained prompts stand before the text and have logits as well: count from the end.
    logits = _logits(model, batch, causal=True)[:, -batch["input_ids"].shape[1] : -1]
    logits = logits.transpose(1, 2)
    return logits, targets, (targets != _IGNORED).sum(1).clamp(min=1)


def causal_lm_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return each text's mean cross-entropy of the next token, in nats."""
    logits, targets, count = _next_tokens(model, batch)
    losses = nn.functional.cross_entropy(
        logits, targets, reduction="none", ignore_index=_IGNORED
    )
    return losses.sum(1) / count


def causal_lm_metrics(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return each text's share of tokens predicted right."""
    logits, targets, count = _next_tokens(model, batch)
    return {"accuracy": (logits.argmax(1) == targets).sum(1) / count}


def _marks(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logits of where an answer begins and ends, ``(examples, tokens)`` each."""
    found = model(**{k: x for k, x in batch.items() if k not in ("start", "end")})
    start, end = found.start_logits, found.end_logits
    if (mask := batch.get("attention_mask")) is not None:
        # An answer is in the text, never in what fills it up.
        least = torch.finfo(start.dtype).min
        start, end = (x.masked_fill(mask == 0, least) for x in (start, end))
    return start, end


def question_answering_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return each question's mean cross-entropy of beginning and end, in nats."""
    start, end = _marks(model, batch)
    losses = [
        nn.functional.cross_entropy(logits, batch[name], reduction="none")
        for name, logits in (("start", start), ("end", end))
    ]
    return (losses[0] + losses[1]) / 2


def question_answering_marks(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the tokens that the model marks as beginning and end, ``(examples,)``."""
    start, end = _marks(model, batch)
    return start.argmax(1), end.argmax(1)


def question_answering_metrics(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return whether each answer's beginning and end are both marked right."""
    start, end = question_answering_marks(model, batch)
    hits = (start == batch["start"]) & (end == batch["end"])
    return {"accuracy": hits.float()}


_LOSSES = {
    "classification": (classification_loss, classification_metrics),
    "causal-lm": (causal_lm_loss, causal_lm_metrics),
    "question-answering": (question_answering_loss, question_answering_metrics),
}

# Loading --------------------------------------------------------------------------


def _imported(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"Hugging Face models need the package {name}: "
            'pip install "flower-ext[lora]"'
        ) from error


def _stamp(folder: Path) -> list[object]:
    """Identify a folder and its contents, by the files' sizes and times."""
    files = sorted(folder.glob("*.*")) if folder.is_dir() else []
    times = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return [str(folder.resolve()), times]


def _require_files(folder: Path, *groups: Iterable[str]) -> None:
    """Require one file of each group."""
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else None
    for group in map(tuple, groups):
        if present is None or present.isdisjoint(group):
            refuse(
                "folder",
                str(folder),
                f"a folder with {' or '.join(group)}",
                "no such folder" if present is None else f"it has {sorted(present)}",
            )


def _load(folder: Path, kind: Kind, num_labels: int) -> _Base:
    transformers = _imported("transformers")
    _require_files(folder, ("config.json",), _WEIGHTS)
    options = {"num_labels": num_labels} if kind == "classification" else {}
    try:
        with _quiet(transformers):
            model, report = getattr(transformers, _AUTO_CLASSES[kind]).from_pretrained(
                str(folder),
                local_files_only=True,
                output_loading_info=True,
                dtype=torch.float32,
                **options,
            )
    except Exception as error:
        raise ValueError(f"the model in {folder} cannot be read: {error}") from error
    return _Base(model, set(report["missing_keys"]), torch.get_rng_state())


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Suppress transformers' progress bar and its report of new weights."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _with_adapter(
    base: _Base, adapter: "PeftConfig | Path | str", random_state: Tensor
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Put an adapter on a copy of a base; unchanged parameters are shared again.

    Returns
    -------
    tuple of torch.nn.Module and dict[str, Tensor]
        The adapted model, and the base's parameters that the adapter changed.
    """
    # Every parameter is copied, since an adapter may change it. Those that it left
    # alone point to the base's numbers again, and their copies are freed.
    copies = {
        name: (p, nn.Parameter(p.detach().clone(), p.requires_grad))
        for name, p in base.model.named_parameters()
    }
    model = deepcopy(base.model, {id(p): own for p, own in copies.values()})
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(random_state)
        if isinstance(adapter, Path | str):
            adapted = _with_saved_adapter(model, Path(adapter).expanduser())
        else:
            adapted = _with_new_adapter(model, deepcopy(adapter))
    changed = {}
    for name, (p, own) in copies.items():
        if torch.equal(own, p):
            own.data = p.data
        else:
            changed[name] = own.detach()
    return adapted, changed


def _short(adapter: "PeftConfig | Path | str") -> str:
    named = isinstance(adapter, Path | str)
    return str(adapter) if named else type(adapter).__name__


def _with_saved_adapter(model: nn.Module, folder: Path) -> nn.Module:
    peft = _imported("peft")
    _require_files(
        folder,
        ("adapter_config.json",),
        ("adapter_model.safetensors", "adapter_model.bin"),
    )
    config = peft.PeftConfig.from_pretrained(str(folder))
    adapted: nn.Module
    if not config.is_prompt_learning:
        adapted = peft.PeftModel.from_pretrained(
            model, str(folder), is_trainable=True, local_files_only=True
        )
        return adapted
    # peft saves the prompts but not the network that computes them, and does not make
    # loaded prompts trainable itself.
    if config.peft_type == "P_TUNING" or getattr(config, "prefix_projection", False):
        refuse(
            "trains",
            str(folder),
            "an adapter that can be trained further",
            "of P-tuning, and prefixes with a projection, only the prompts are saved",
        )
    config.inference_mode = False
    adapted = peft.get_peft_model(model, config)
    weights = peft.load_peft_weights(str(folder), device="cpu")
    peft.set_peft_model_state_dict(adapted, weights)
    return adapted


def _with_new_adapter(model: nn.Module, config: "PeftConfig") -> nn.Module:
    leaves = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d)
    }
    try:
        adapted: nn.Module = _imported("peft").get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(
            f"the adapter does not fit the model, which has modules of the names "
            f"{sorted(leaves)}: {error}"
        ) from error
    if config.is_prompt_learning:
        _require_run(adapted, config)
    return adapted


@torch.no_grad()
def _require_run(model: nn.Module, config: "PeftConfig") -> None:
    """Run a model with prompts once: not every model takes them."""
    # Here, where the adapter can be named, and not in some client's first batch.
    batch = {"input_ids": torch.ones(1, 2), "attention_mask": torch.ones(1, 2)}
    if hasattr(config, "num_tasks"):
        batch["task_ids"] = torch.zeros(1)
    try:
        model(**{name: x.long() for name, x in batch.items()})
    except Exception as error:
        refuse(
            "trains",
            _short(config),
            "an adapter with which the model runs",
            f"it failed with {error!r}",
        )


def _sorted(value: object) -> object:
    """Write what JSON has not: sets in order, all else as it prints itself."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _plain(name: str) -> str:
    """Return a parameter's name as it was before peft wrapped its module."""
    parts = name.split(".")
    while "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        del parts[at : at + 2]  # the name of the adapter follows
    return "." + ".".join(parts)


# Copies ---------------------------------------------------------------------------


def _alias(model: nn.Module) -> nn.Module:
    """Copy a model that shares its parameters' numbers, but not their requires_grad."""
    # deepcopy uses what its memo has: there every parameter is one on the same storage.
    return deepcopy(
        model, {id(p): nn.Parameter(p.detach()) for p in model.parameters()}
    )


class _Template:
    """A model that is copied for every client; the copies share what is frozen.

    It is kept pickled, without its tensors. A ``deepcopy`` takes about five times as
    long, most of it for a thousand empty dictionaries of hooks.
    """

    def __init__(self, model: nn.Module, *, buffers: bool) -> None:
        named = dict(model.named_buffers())
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        # Parameters on the same storage, such as those of tied adapters, are sent once,
        # under the first of their names.
        numbers = {(p.data_ptr(), p.numel()): n for n, p in reversed(trained.items())}
        sent = set(numbers.values())
        if buffers:
            sent |= set(named)
        self._class = _sending(
            type(model), [n for n in model.state_dict() if n in sent]
        )
        self._tensors = [*model.parameters(), *named.values()]
        file = BytesIO()
        _WithoutTensors(file, self._tensors).dump(model)
        self._model = file.getvalue()

    def copy(self) -> nn.Module:
        """Return a model of its own."""
        storages: dict[int, Tensor] = {}
        tensors = [
            x
            if isinstance(x, nn.Parameter) and not x.requires_grad
            else _clone(x, storages)
            for x in self._tensors
        ]
        model: nn.Module = _WithTensors(BytesIO(self._model), tensors).load()
        model.__class__ = self._class
        model.register_load_state_dict_post_hook(_expect_sent)  # type: ignore[no-untyped-call]
        return model


class _WithoutTensors(pickle.Pickler):
    """Writes the indices of some tensors in a list instead of the tensors."""

    def __init__(self, file: BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._places = {id(x): i for i, x in enumerate(tensors)}

    def persistent_id(self, value: object) -> int | None:
        """Return the index of a tensor, None for all else."""
        return self._places.get(id(value))


class _WithTensors(pickle.Unpickler):
    """Reads what :class:`_WithoutTensors` wrote, with tensors of another list."""

    def __init__(self, file: BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, place: int) -> Tensor:
        """Return the tensor of an index."""
        return self._tensors[place]


def _clone(x: Tensor, storages: dict[int, Tensor]) -> Tensor:
    """Copy a tensor; tensors on one storage are on one storage in the copy, too."""
    # A part of a larger storage is copied alone. A whole storage is copied once, and
    # all views of it are made on that copy: tied and transposed weights stay tied.
    own = x.detach()
    storage = own.untyped_storage()
    if storage.nbytes() != own.nbytes:
        own = own.clone()
    else:
        flat = own.as_strided((own.numel(),), (1,), 0)
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = flat.clone()
        own = storages[storage.data_ptr()].as_strided(own.shape, own.stride(), 0)
    return nn.Parameter(own) if isinstance(x, nn.Parameter) else own


class _Sending:
    """A model whose ``state_dict`` holds, and loads, only what is trained.

    Every client asks for it several times, and to walk through all modules of a large
    base, most of which have nothing to send, takes as long as a step on a small batch.
    """

    _sent: tuple[str, ...]

    def state_dict(
        self,
        *,
        destination: dict[str, Tensor] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
    ) -> dict[str, Tensor]:
        """Return what is sent, in the order of the model's own."""
        found = OrderedDict() if destination is None else destination
        for name in self._sent:
            x = attrgetter(name)(self)
            found[prefix + name] = x if keep_vars else x.detach()
        return found


def _sending(kind: type[nn.Module], sent: Iterable[str]) -> type[nn.Module]:
    """Return the class of models of a kind that send what is named."""
    return type(kind.__name__, (_Sending, kind), {"_sent": tuple(sent)})


def _expect_sent(model: Any, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if name in model._sent]
