"""Hugging Face models: only what is trained is sent, plain peft reads what is saved."""

import json
import shutil
import socket
from copy import deepcopy

import numpy as np
import peft
import pytest
import torch
import transformers
from flwr.app import ArrayRecord

from flower_ext.client import stacked
from flower_ext.client.adapters import (
    AdapterModel,
    adapter_task,
    load_tokenizer,
    question_answering_marks,
)
from flower_ext.client.app import client_app
from flower_ext.client.stacked import Stacked
from flower_ext.client.trainer import Plain
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.optimizers import Adam
from flower_ext.simulation.local import LocalGrid


def lora(**options):
    settings = {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    return peft.LoraConfig(**settings | options)


@pytest.fixture(scope="session")
def bert(tiny_bert):
    return tiny_bert


@pytest.fixture(scope="session")
def gpt(tmp_path_factory):
    """A random causal language model of two layers."""
    folder = tmp_path_factory.mktemp("gpt")
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """Let every attempt to connect fail, and be seen."""
    attempts = []

    def refuse(self, address, *_):
        attempts.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: refuse(None, a))
    return attempts


def logits(model, ids=((1, 2, 3, 4),)):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(ids)).logits


# What is sent ---------------------------------------------------------------------


def test_only_adapter_and_head_are_sent(bert):
    state = AdapterModel(bert, lora(), num_labels=3)({}).state_dict()
    # Two layers, two modules each, A (4, 16) and B (16, 4); head 3 x 16 + 3.
    assert sum(x.numel() for x in state.values()) == 2 * 2 * 2 * 4 * 16 + 51
    assert all("lora_" in name or "modules_to_save" in name for name in state)


@pytest.mark.parametrize(
    ("trains", "names"),
    [
        ("head", {"classifier.weight", "classifier.bias"}),
        ("all", None),
    ],
)
def test_probe_and_full_fine_tuning(bert, trains, names):
    model = AdapterModel(bert, trains)({})
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == (names or {name for name, _ in model.named_parameters()})
    assert trained <= set(model.state_dict())
    assert names is None or trained == set(model.state_dict())


def test_frozen_a_is_not_sent_and_the_same_everywhere(bert):
    make = AdapterModel(bert, lora(), frozen=("lora_A",))
    first, second = make({}), make({})
    assert not any("lora_A" in name for name in first.state_dict())
    full = dict(first.named_parameters())
    a = [name for name in full if "lora_A" in name]
    assert a and all(not full[name].requires_grad for name in a)
    assert all(full[name] is dict(second.named_parameters())[name] for name in a)


def test_tied_weights_are_sent_once(gpt):
    model = AdapterModel(gpt, "all", "causal-lm")({})
    state = model.state_dict()
    assert "lm_head.weight" not in state
    state["model.embed_tokens.weight"] += 1
    model.load_state_dict(state)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("trains", ["all", "head", None])
def test_what_is_sent_is_a_part_of_the_plain_state(bert, trains):
    model = AdapterModel(bert, trains or lora())({})
    plain = type(model).__mro__[2].state_dict(model)  # of the class as it is elsewhere
    sent = model.state_dict()
    assert [*sent] == [name for name in plain if name in sent]
    assert len(sent) > 0 and (trains == "all") == (len(sent) == len(plain))
    for name, x in sent.items():
        assert x.data_ptr() == plain[name].data_ptr() and not x.requires_grad
    outer = torch.nn.ModuleDict({"inner": model}).state_dict()
    assert [*outer] == [f"inner.{name}" for name in sent]
    # A copy has numbers of its own.
    copied = deepcopy(model).state_dict()
    assert not {x.data_ptr() for x in copied.values()} & {
        x.data_ptr() for x in sent.values()
    }
    assert str(model).startswith(type(model).__mro__[2].__name__)


# One base for all clients ---------------------------------------------------------


def test_base_is_read_once_and_shared(bert, monkeypatch):
    make = AdapterModel(bert, lora(), num_labels=5)
    first = make({})
    auto = transformers.AutoModelForSequenceClassification
    monkeypatch.setattr(auto, "from_pretrained", None)  # it would fail
    second = make({})
    third = AdapterModel(bert, lora(r=2), num_labels=5)({})
    frozen = {n: p for n, p in first.named_parameters() if not p.requires_grad}
    for other in (second, third):
        shared = dict(other.named_parameters())
        assert frozen
        for name, p in frozen.items():
            assert p.data_ptr() == shared[name].data_ptr()


def test_clients_do_not_see_each_other(bert):
    make = AdapterModel(bert, lora(), num_labels=3)
    first, second = make({}), make({})
    before = {k: x.clone() for k, x in second.state_dict().items()}
    first.load_state_dict({k: x + 1 for k, x in first.state_dict().items()})
    for model in (second, make({})):
        assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())


def test_kinds_of_training_do_not_disturb_each_other(bert):
    sizes = []
    for trains in ("all", lora(), "head", "all", "head", lora()):
        state = AdapterModel(bert, trains)({}).state_dict()
        sizes.append(sum(x.numel() for x in state.values()))
    assert sizes[0] == sizes[3] and sizes[1] == sizes[5] and sizes[2] == sizes[4]
    full = AdapterModel(bert, "all")({})
    full.load_state_dict({k: x + 1 for k, x in full.state_dict().items()})
    clean = transformers.AutoModelForSequenceClassification.from_pretrained(bert)
    probe = AdapterModel(bert, "head")({})
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(dict(probe.named_parameters())[name], clean.get_parameter(name))


def test_new_weights_depend_on_the_seed_alone(bert):
    torch.manual_seed(1)
    first = AdapterModel(bert, lora(r=3), seed=7)({}).state_dict()
    other = AdapterModel(bert, lora(r=3), seed=8)({}).state_dict()
    from flower_ext.client import adapters

    adapters._bases.clear()
    adapters._models.clear()
    torch.manual_seed(2)
    again = AdapterModel(bert, lora(r=3), seed=7)({}).state_dict()
    assert all(torch.equal(x, again[name]) for name, x in first.items())
    assert any(not torch.equal(x, other[name]) for name, x in first.items())


@pytest.mark.parametrize("before", ["head", "all", lora(r=2)])
def test_new_weights_do_not_depend_on_what_was_made_before(bert, before):
    from flower_ext.client import adapters

    states = []
    for first in ((), (before,)):
        adapters._bases.clear()
        adapters._models.clear()
        for trains in first:
            AdapterModel(bert, trains, seed=5)({})
        states.append(AdapterModel(bert, lora(), seed=5)({}).state_dict())
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


# Saving and starting again --------------------------------------------------------


def moved(model):
    state = {k: x + 0.1 for k, x in model.state_dict().items()}
    model.load_state_dict(state)
    return ArrayRecord(state)


def test_saved_adapter_loads_with_plain_peft_and_starts_a_run(bert, tmp_path):
    for frozen in ((), ("lora_A",)):
        make = AdapterModel(bert, lora(), num_labels=3, frozen=frozen)
        model = make({})
        make.save(moved(model), tmp_path)
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            bert, num_labels=3
        )
        plain = peft.PeftModel.from_pretrained(base, tmp_path)
        assert torch.allclose(logits(plain), logits(model))
        again = AdapterModel(bert, tmp_path, num_labels=3)({})
        assert torch.allclose(logits(again), logits(model))
        assert set(again.state_dict()) >= set(model.state_dict())


@pytest.mark.parametrize("trains", ["head", "all"])
def test_saved_model_loads_with_plain_transformers(bert, tmp_path, trains):
    make = AdapterModel(bert, trains, num_labels=3)
    model = make({})
    make.save(moved(model), tmp_path)
    auto = transformers.AutoModelForSequenceClassification
    assert torch.allclose(logits(auto.from_pretrained(tmp_path)), logits(model))


# Every kind of adapter ------------------------------------------------------------

CAUSAL = {"task_type": "CAUSAL_LM"}
ATTENTION = {**CAUSAL, "target_modules": ["q_proj", "v_proj"]}
PROMPTS = {**CAUSAL, "num_virtual_tokens": 3}


def table():
    """Yield a name and a configuration of every kind of adapter, for a Llama."""
    for beginning in (True, False, "gaussian", "orthogonal", "olora", "pissa"):
        yield (
            f"lora {beginning}",
            peft.LoraConfig(r=4, init_lora_weights=beginning, **ATTENTION),
        )
    yield "dora", peft.LoraConfig(r=4, use_dora=True, **ATTENTION)
    yield "biases", peft.LoraConfig(r=4, bias="all", **ATTENTION)
    yield (
        "embedding and head",
        peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], **CAUSAL),
    )
    yield "saved head", peft.LoraConfig(r=4, modules_to_save=["lm_head"], **ATTENTION)
    yield (
        "saved, tied",
        peft.LoraConfig(
            r=4,
            modules_to_save=["embed_tokens"],
            ensure_weight_tying=True,
            **ATTENTION,
        ),
    )
    yield (
        "targets, tied",
        peft.LoraConfig(
            r=4, target_modules=["embed_tokens"], ensure_weight_tying=True, **CAUSAL
        ),
    )
    yield (
        "tokens of lora",
        peft.LoraConfig(r=4, trainable_token_indices=[3, 4], **ATTENTION),
    )
    yield "tokens", peft.TrainableTokensConfig(token_indices=[3, 4], **CAUSAL)
    yield "vera", peft.VeraConfig(r=4, **ATTENTION)
    yield (
        "vera, unsaved projection",
        peft.VeraConfig(r=4, save_projection=False, **ATTENTION),
    )
    yield (
        "vblora",
        peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, topk=2, **ATTENTION),
    )
    yield "randlora", peft.RandLoraConfig(r=4, **ATTENTION)
    yield (
        "ia3",
        peft.IA3Config(
            target_modules=["v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            **CAUSAL,
        ),
    )
    yield "loha", peft.LoHaConfig(r=4, **ATTENTION)
    yield "lokr", peft.LoKrConfig(r=4, **ATTENTION)
    yield (
        "adalora",
        peft.AdaLoraConfig(init_r=4, target_r=2, total_step=100, **ATTENTION),
    )
    yield "oft", peft.OFTConfig(oft_block_size=4, r=0, **ATTENTION)
    yield "boft", peft.BOFTConfig(boft_block_size=4, **ATTENTION)
    yield "hra", peft.HRAConfig(r=4, **ATTENTION)
    yield "fourier", peft.FourierFTConfig(n_frequency=10, **ATTENTION)
    yield "norms", peft.LNTuningConfig(target_modules=["input_layernorm"], **CAUSAL)
    yield (
        "llama-adapter",
        peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, **CAUSAL),
    )
    yield "prompts", peft.PromptTuningConfig(**PROMPTS)
    yield "p-tuning", peft.PromptEncoderConfig(encoder_hidden_size=8, **PROMPTS)
    yield "prefixes", peft.PrefixTuningConfig(**PROMPTS)
    yield (
        "projected prefixes",
        peft.PrefixTuningConfig(
            prefix_projection=True, encoder_hidden_size=8, **PROMPTS
        ),
    )


ONLY_PROMPTS_ARE_SAVED = ("p-tuning", "projected prefixes")


def sentences(context):
    generator = torch.Generator().manual_seed(context.node_config["partition-id"])
    ids = torch.randint(1, 30, (8, 6), generator=generator)
    return ({"input_ids": ids, "attention_mask": torch.ones_like(ids)},) * 2


@pytest.mark.parametrize(("name", "config"), list(table()))
def test_adapter_of_every_kind_trains_saves_and_leaves_the_base(
    gpt, tmp_path, name, config
):
    plain = AdapterModel(gpt, peft.LoraConfig(r=2, **ATTENTION), "causal-lm")
    neighbour = plain({})
    base = {n: p.clone() for n, p in neighbour.named_parameters()}
    make = AdapterModel(gpt, config, "causal-lm")
    start = make({})
    # What is trained is sent, once under whatever names it has.
    trained = {p.data_ptr() for p in start.parameters() if p.requires_grad}
    sent = [dict(start.named_parameters())[n].data_ptr() for n in start.state_dict()]
    assert sorted(sent) == sorted(trained)
    # A round of training changes the model.
    app = client_app(adapter_task(make, sentences))
    grid = LocalGrid(app, 2, {"lr": 0.5, "batch-size": 4})
    initial = ArrayRecord(start.state_dict())
    strategy = AdditiveStrategy(fraction_evaluate=0.0)
    result = strategy.start(grid, initial, num_rounds=1)
    metrics = result.train_metrics_clientapp[1]
    assert (metrics["num-replies"], metrics["num-errors"]) == (2, 0)
    model = make({})
    model.load_state_dict(result.arrays.to_torch_state_dict())
    assert not torch.equal(logits(model), logits(start))
    # Plain peft loads it, and so does a run that goes on.
    make.save(result.arrays, tmp_path)
    torch.manual_seed(5)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(gpt)
    loaded = peft.PeftModel.from_pretrained(loaded, tmp_path)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-6)
    again = AdapterModel(gpt, tmp_path, "causal-lm")
    if name in ONLY_PROMPTS_ARE_SAVED:
        with pytest.raises(ValueError, match="only the prompts are saved"):
            again({})
    else:
        assert torch.allclose(logits(again({})), logits(model), atol=1e-6)
        assert again({}).state_dict().keys() == start.state_dict().keys()
    # No other adapter has noticed.
    for other in (neighbour, plain({})):
        for n, p in other.named_parameters():
            assert torch.equal(p, base[n])


def test_unchanged_weights_of_a_changed_base_are_shared(gpt):
    olora = peft.LoraConfig(r=4, init_lora_weights="olora", **ATTENTION)
    plain = peft.LoraConfig(r=4, **ATTENTION)
    first, second = (
        dict(AdapterModel(gpt, config, "causal-lm")({}).named_parameters())
        for config in (olora, plain)
    )
    frozen = [n for n, p in first.items() if not p.requires_grad]
    own = {n for n in frozen if first[n].data_ptr() != second[n].data_ptr()}
    assert own == {n for n in frozen if "q_proj" in n or "v_proj" in n}


def test_adapter_that_changes_the_base_at_random(gpt):
    config = peft.LoraConfig(r=4, init_lora_weights="pissa_niter_4", **ATTENTION)
    with pytest.raises(ValueError, match="'LoraConfig' must be .* changed at random"):
        AdapterModel(gpt, config, "causal-lm")({})


def test_model_that_does_not_run_with_prompts(bert):
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="with which the model runs: .*past key"):
        AdapterModel(bert, config)({})


# Errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_incomplete_folder(bert, tmp_path, missing):
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"must be a folder with .*{missing}.*it has"):
        AdapterModel(folder, "head")({})
    with pytest.raises(ValueError, match="no such folder"):
        AdapterModel(tmp_path / "nothing", "head")({})


def test_weights_cut_off(bert, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        AdapterModel(folder, "head")({})


def test_incomplete_adapter(bert, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        AdapterModel(bert, tmp_path)({})


def test_target_modules_that_match_nothing(bert):
    with pytest.raises(ValueError, match=r"'query', 'token_type.*: .*target"):
        AdapterModel(bert, lora(target_modules=["q_proj"]))({})


def test_weights_that_would_stay_random(bert):
    without_head = lora(task_type=None)
    with pytest.raises(ValueError, match=r"'classifier\.bias'.*would stay random"):
        AdapterModel(bert, without_head)({})
    named = lora(task_type=None, modules_to_save=["classifier"])
    assert AdapterModel(bert, named)({}).state_dict()


def test_nothing_to_train(gpt):
    # The head of a causal model is its embedding.
    with pytest.raises(ValueError, match="leaves parameters to train"):
        AdapterModel(gpt, "head", "causal-lm")({})


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"kind": "regression"}, "kind='regression'"),
        ({"num_labels": 0}, "num_labels=0"),
        ({"frozen": "lora_A"}, "frozen='lora_A'"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_settings_out_of_range(bert, option, match):
    with pytest.raises(ValueError, match=match):
        AdapterModel(bert, "head", **option)


def test_tokenizer_of_another_model(bert, tmp_path):
    assert load_tokenizer(bert)("a b")["input_ids"]
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 6}))
    with pytest.raises(ValueError, match="has 12 tokens, its model knows 6"):
        load_tokenizer(folder)
    (folder / "vocab.txt").unlink(missing_ok=True)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"tokenizer\.json or"):
        load_tokenizer(folder)


def test_no_hub_is_asked(bert, tmp_path, no_network):
    make = AdapterModel(bert, lora(), num_labels=4)
    make.save(ArrayRecord(make({}).state_dict()), tmp_path)
    AdapterModel(bert, tmp_path, num_labels=4)({})
    load_tokenizer(bert)
    with pytest.raises(ValueError):
        AdapterModel("bert-base-uncased", "head")({})
    assert not no_network


# Tasks ----------------------------------------------------------------------------


def texts(context):
    client = context.node_config["partition-id"]
    generator = torch.Generator().manual_seed(client)
    ids = torch.randint(1, 12, (12, 6), generator=generator)
    columns = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": (ids[:, 0] > 5).long(),
    }
    return columns, {name: x[:5] for name, x in columns.items()}


def test_classification_is_learned_in_a_run(bert):
    model = AdapterModel(bert, lora(), num_labels=2)
    task = adapter_task(model, texts)
    config = {"lr": 0.5, "batch-size": 4, "local-epochs": 3}
    grid = LocalGrid(client_app(task), 2, config)
    initial = ArrayRecord(model({}).state_dict())
    result = AdditiveStrategy().start(grid, initial, num_rounds=4)
    losses = [m["train-loss"] for m in result.train_metrics_clientapp.values()]
    assert losses[-1] < losses[0]
    assert all(m["num-errors"] == 0 for m in result.train_metrics_clientapp.values())
    assert 0 <= result.evaluate_metrics_clientapp[4]["accuracy"] <= 1


def test_loss_is_that_of_transformers(bert, gpt):
    classifier = AdapterModel(bert, "head", num_labels=2)
    task = adapter_task(classifier, texts)
    model = classifier({}).eval()
    batch = {
        "input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "labels": torch.tensor([1, 0]),
    }
    assert float(task.loss(model, batch).mean()) == pytest.approx(
        float(model(**batch).loss), rel=1e-5
    )
    causal = AdapterModel(gpt, "all", "causal-lm")
    task = adapter_task(causal, texts)
    model = causal({}).eval()
    del batch["labels"]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    losses = task.loss(model, batch)
    for i in range(2):
        labels = ids[i : i + 1].masked_fill(mask[i : i + 1] == 0, -100)
        theirs = model(ids[i : i + 1], mask[i : i + 1], labels=labels).loss
        assert float(losses[i]) == pytest.approx(float(theirs), rel=1e-5)
    hits = task.metrics(model, batch)["accuracy"]
    predicted = model(ids, mask).logits.argmax(-1)[:, :-1] == ids[:, 1:]
    assert hits.tolist() == [
        pytest.approx(float(predicted[0].float().mean())),
        pytest.approx(float(predicted[1, 0])),
    ]


def test_answers_are_marked_as_by_transformers(gpt, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig.from_pretrained(gpt)
    transformers.LlamaForQuestionAnswering(config).save_pretrained(tmp_path)
    config = lora(target_modules=["q_proj"], task_type="QUESTION_ANS")
    make = AdapterModel(tmp_path, config, "question-answering")
    task, model = adapter_task(make, texts), make({}).eval().requires_grad_(False)
    assert any("qa_outputs" in name for name in model.state_dict())
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 4], [4, 5, 6, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "start": torch.tensor([1, 0]),
        "end": torch.tensor([3, 2]),
    }
    losses = task.loss(model, batch)
    for i, length in enumerate((4, 3)):
        # Alone, and as long as it is: what fills it up is never marked.
        theirs = model(
            input_ids=batch["input_ids"][i : i + 1, :length],
            start_positions=batch["start"][i : i + 1],
            end_positions=batch["end"][i : i + 1],
        )
        assert float(losses[i]) == pytest.approx(float(theirs.loss), rel=1e-5)
        marked = (theirs.start_logits.argmax(), theirs.end_logits.argmax())
        marks = [int(x[i]) for x in question_answering_marks(model, batch)]
        assert marks == [int(x) for x in marked]
        truths = [int(batch[name][i]) for name in ("start", "end")]
        hit = task.metrics(model, batch)["accuracy"][i]
        assert float(hit) == float(marks == truths)
    marked = question_answering_marks(model, batch)
    right = batch | dict(zip(("start", "end"), marked, strict=True))
    assert task.metrics(model, right)["accuracy"].tolist() == [1, 1]


def test_packages_that_are_missing(monkeypatch, bert):
    import sys

    from flower_ext.client import adapters

    monkeypatch.setattr(adapters, "_bases", {})
    monkeypatch.setattr(adapters, "_models", {})
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"flower-ext\[lora\]"):
        AdapterModel(bert, "head")({})


def test_arrays_are_float32(bert):
    state = ArrayRecord(AdapterModel(bert, "all")({}).state_dict())
    kinds = {array.numpy().dtype for array in state.values()}
    assert np.dtype(np.float32) in kinds


@pytest.mark.slow
def test_real_albert_learns_offline(no_network, tmp_path):
    """A model of 3 MB, trained on molecules: which of two elements a string has."""
    from flower_ext.data import model_folder

    folder = model_folder("albert-smiles")
    config = peft.LoraConfig(
        r=4, target_modules=["query", "value"], modules_to_save=["classifier", "pooler"]
    )
    model = AdapterModel(folder, config)
    vocabulary = (folder / "vocab.txt").read_text("utf-8").split()
    tokens = {name: i for i, name in enumerate(vocabulary)}

    def molecules(context):
        generator = torch.Generator().manual_seed(context.node_config["partition-id"])
        labels = torch.randint(0, 2, (24,), generator=generator)
        rest = torch.full((24, 5), tokens["C"])
        last = torch.where(labels == 1, tokens["N"], tokens["O"])
        ids = torch.cat([rest, last[:, None]], 1)
        return ({"input_ids": ids, "labels": labels},) * 2

    task = adapter_task(model, molecules)
    from flower_ext.strategies.flasc import FLASC, FLASCClient

    strategy = FLASC(download_density=0.25, scope="tensor", server_optimizer=Adam(0.01))
    grid = LocalGrid(client_app(task, FLASCClient), 2, {"lr": 0.1, "batch-size": 8})
    start = ArrayRecord(model({}).state_dict())
    result = strategy.start(grid, start, num_rounds=6)
    assert result.evaluate_metrics_clientapp[6]["accuracy"] > 0.9
    model.save(strategy.masked(result.arrays), tmp_path)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert peft.PeftModel.from_pretrained(base, tmp_path)
    assert not no_network


# Several clients as one computation -----------------------------------------------


def padded(context, *, length=9):
    """Texts of different lengths, and as many texts as the client has."""
    client = int(context.node_config["partition-id"])
    draw = torch.Generator().manual_seed(client)
    ids = torch.randint(1, 12, (3 + client % 3, length), generator=draw)
    ends = torch.randint(4, length + 1, (len(ids), 1), generator=draw)
    columns = {
        "input_ids": ids,
        "attention_mask": (torch.arange(length) < ends).long(),
        "labels": torch.randint(0, 2, (len(ids),), generator=draw),
    }
    return columns, columns


def causal_padded(context):
    columns = {k: x for k, x in padded(context)[0].items() if k != "labels"}
    return columns, columns


@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
def test_clients_that_share_a_base_are_stacked(kind, bert, gpt, monkeypatch, caplog):
    if kind == "causal-lm":
        config = lora(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model, data = AdapterModel(gpt, config, kind), causal_padded
    else:  # dropout in the adapter, too, beside those of BERT
        model, data = AdapterModel(bert, lora(lora_dropout=0.2), kind), padded
    shared = []
    step = stacked._Stack.step

    def watched(self, **options):
        shared.append((set(self._shared), len(self.members)))
        step(self, **options)

    monkeypatch.setattr(stacked._Stack, "step", watched)
    task = adapter_task(model, data)
    runs = []
    for trainer in (Plain(), Stacked(6)):
        grid = LocalGrid(client_app(task, trainer=trainer), 6, {"batch-size": 4})
        strategy = AdditiveStrategy(fraction_evaluate=0.0)
        initial = ArrayRecord(model({}).state_dict())
        runs.append(strategy.start(grid, initial, num_rounds=2).arrays)
    for name, x in runs[0].items():
        np.testing.assert_allclose(runs[1][name].numpy(), x.numpy(), atol=1e-6)
    frozen = {n for n, p in model({}).named_parameters() if not p.requires_grad}
    assert all(frozen <= names for names, _ in shared)
    assert max(size for _, size in shared) > 1
    assert not any("one after the other" in said for said in caplog.messages)
