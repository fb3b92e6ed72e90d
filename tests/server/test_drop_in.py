import ast
import textwrap

import pytest

from flower_ext.server.drop_in import (
    DropIn,
    NoPlace,
    add_half,
    changes,
    edit,
    replace_strategy,
)
from flower_ext.strategies import FedFish, MaxFL

FISHER = FedFish.drop_in

CLIENT = textwrap.dedent(
    '''\
    """Ein Kunde für Prüfungen: 'ä' is two bytes."""
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(msg, context):
        model = Net(); model.load_state_dict(msg.content["arrays"])
        trainloader, _ = load_data(context, "größe")
        train_fn(model, trainloader)
        return Message(RecordDict({"ä": ArrayRecord(model.state_dict())}), reply_to=msg)
    '''
)


def differing(lines):
    return [line for line in lines if not line.startswith(" ")]


def edited(source, drop_in=FISHER):
    new = edit(source, "app", drop_in)
    ast.parse(new)
    return differing(changes(source, new))


def test_what_is_added_stands_between_its_neighbours():
    """What replaces a line stands alone, and a neighbour of two is shown once."""
    assert changes("a\nb\nc\nd\n", "a\nx\nb\ny\nc\nD\n") == [
        " a",
        "+x",
        " b",
        "+y",
        " c",
        "-d",
        "+D",
    ]
    assert changes("a\n\nb", "a\n\nx\nb") == ["+x", " b"]
    assert changes("a", "a\nx") == [" a", "+x"]
    assert changes("a", "a") == []


def test_lines_go_before_the_training_and_into_the_reply():
    assert edited(CLIENT) == [
        "+from flower_ext.strategies.fedfish import watch_fisher",
        "+    fisher = watch_fisher(model, batches_per_epoch=len(trainloader))",
        '-    return Message(RecordDict({"ä": ArrayRecord(model.state_dict())}), '
        "reply_to=msg)",
        '+    return Message(RecordDict({"ä": ArrayRecord(model.state_dict()), '
        '"fisher": fisher.record()}), reply_to=msg)',
    ]


def test_message_and_context_are_called_what_the_app_calls_them():
    lines = DropIn(before="controls = of({message}, {context})")
    line = "+    controls = of(note, ctx)"
    assert edited(CLIENT.replace("(msg, context)", "(note, ctx)"), lines) == [line]
    assert lines.lines() == ["controls = of(msg, context)"]


def test_a_metric_that_the_author_fills_in_needs_no_model_of_torch():
    source = CLIENT.replace("model.load_state_dict(", "set_params(model, ").replace(
        'RecordDict({"ä"', 'RecordDict({"m": MetricRecord({"a": 1}), "ä"'
    )
    [_, new] = edited(source, DropIn(metrics={"term-loss": "received_loss"}))
    assert 'MetricRecord({"a": 1, "term-loss": received_loss})' in new
    with pytest.raises(NoPlace, match="no model that loads a state_dict"):
        edited(source)


@pytest.mark.parametrize("comma", ["", ","])
def test_a_dict_of_several_lines_gets_a_line(comma):
    source = CLIENT.replace(
        '{"ä": ArrayRecord(model.state_dict())}',
        '{\n        "ä": 1,\n        "ö": 2' + comma + "\n    }",
    )
    assert (
        edited(source)[-2:]
        == [
            f'+        "ö": 2{comma or ","}',
            '+        "fisher": fisher.record(),',
        ]
        or edited(source)[-1] == '+        "fisher": fisher.record(),'
    )


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ("ClientApp()", "ClientApp(mods=[mod()])"),
        ("ClientApp(mods=[])", "ClientApp(mods=[mod()])"),
        ("ClientApp(mods=[clip])", "ClientApp(mods=[mod(), clip])"),
        ("ClientApp(mods=[packed, clip])", "ClientApp(mods=[packed, mod(), clip])"),
    ],
)
def test_a_mod_is_put_around_the_others_but_for_packed(made, expected):
    source = CLIENT.replace("ClientApp()", made)
    assert edited(source, DropIn(mod="mod()")) == [
        f"-app = {made}",
        f"+app = {expected}",
    ]


def test_a_metric_goes_in_under_its_name():
    source = CLIENT.replace(
        '{"ä": ArrayRecord(', '{"m": MetricRecord({"n": 3}), "ä": ('
    )
    line = edited(source, DropIn(metrics={"work": "done"}))[1]
    assert 'MetricRecord({"n": 3, "work": done})' in line


def test_a_dict_that_has_a_name_and_metrics_of_a_call():
    source = CLIENT.replace(
        '    return Message(RecordDict({"ä": ArrayRecord(model.state_dict())}), '
        "reply_to=msg)",
        '    found = {"num-examples": 3}\n'
        "    return Message(RecordDict({'m': MetricRecord(found)}), reply_to=msg)",
    )
    assert '+    found = {"num-examples": 3, **wants}' in edited(source, MaxFL.drop_in)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("@app.train()", "@other.train()", "decorated with @app.train"),
        ("model.load_state_dict", "model.load", "no model"),
        ("trainloader", "data", "no training data"),
        ("train_fn(model, trainloader)", "train_fn(model)", "no statement with"),
        ("RecordDict({", "Records({", "no RecordDict"),
    ],
)
def test_what_is_not_found_is_said(old, new, says):
    with pytest.raises(NoPlace, match=says):
        edit(CLIENT.replace(old, new), "app", FISHER)


def test_lines_for_a_reader_name_every_place():
    lines = FISHER.lines("net", "loader")
    assert lines[1] == "fisher = watch_fisher(net, batches_per_epoch=len(loader))"
    assert lines[2] == '# in the reply\'s RecordDict: "fisher": fisher.record()'


def test_a_half_is_added_to_a_task():
    source = "from x import task\nfrom flower_ext import client_app\n\n"
    source += "app = client_app(task, mods=[packed])\n"
    assert differing(changes(source, add_half(source, "app", "Half", "a.b"))) == [
        "+from a.b import Half",
        "-app = client_app(task, mods=[packed])",
        "+app = client_app(task, Half, mods=[packed])",
    ]
    with pytest.raises(NoPlace, match="client_app"):
        add_half(CLIENT, "app", "Half", "a.b")


SERVER = """\
from flwr.serverapp.strategy import FedAvg

def main(grid, context):
    strategy = FedAvg(
        fraction_train=0.5,
    )
"""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "FedFish(\n        fraction_train=0.5,\n    )"),
        ("damping=1", "FedFish(\n        fraction_train=0.5, damping=1)"),
    ],
)
def test_a_strategy_is_replaced_with_its_import(arguments, expected):
    new = replace_strategy(SERVER, "FedAvg", "FedFish", arguments)
    assert new.startswith("from flower_ext.strategies import FedFish\n")
    assert f"strategy = {expected}" in new
    ast.parse(new)


def test_other_names_of_an_import_stay():
    source = SERVER.replace("import FedAvg", "import FedAvg, Result")
    new = replace_strategy(source, "FedAvg", "AdditiveStrategy", "")
    assert "import FedAvg, Result\nfrom flower_ext import AdditiveStrategy\n" in new
    with pytest.raises(NoPlace, match="FedAdam"):
        replace_strategy(source, "FedAdam", "FedFish", "")
