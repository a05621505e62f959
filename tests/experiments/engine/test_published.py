"""What the paper and its later edition printed: every number of theirs stands beside one net of ours, and no other."""

import itertools
import json
from pathlib import Path

import pytest

from experiments import allcnn, depth, parameters, resnet50, width
from experiments.engine.published import published, published_time

TABLES = json.loads((Path(depth.__file__).parent / "published.json").read_text(encoding="utf-8"))
MODULES = {module.TABLE.name: module for module in (width, depth, parameters, allcnn, resnet50)}


def paper_nets(name):
    """The nets of the paper's protocol, once each."""
    table = MODULES[name].TABLE
    settings = table.check(table.parse(["--preset", "paper", "--act", "all"]))
    return [{**vars(settings), **cell} for cell in table.cells(settings)]


@pytest.mark.parametrize("name", MODULES)
def test_each_printed_number_has_its_net(name):
    for edition in ("paper", "later"):
        printed = [accuracy for nets in TABLES[name]["nets"] for accuracy in nets[edition].values()]
        found = [published(name, net)[edition] for net in paper_nets(name)]
        assert sorted(x for x in found if x is not None) == sorted(printed)
        assert found.count(None) == (5 if name == "resnet50" else 0)  # ReLU, PReLU and Swish without batch norm


@pytest.mark.parametrize(
    ("name", "cell", "paper", "later"),  # read off the printed tables
    [
        ("width", {"act": "lk_selu", "width": 400}, 0.5312, 0.599),
        ("width", {"act": "relu", "width": 50}, 0.5706, 0.5767),
        ("depth", {"act": "relu_bn", "depth": 50, "width": 4}, 0.1205, 0.5202),
        ("depth", {"act": "selu_sqrt2", "depth": 50, "width": 4}, 0.2386, 0.5707),
        ("parameters", {"act": "relu_sqrt2"}, 0.7394, 0.7581),
        ("parameters", {"act": "swish"}, 0.5766, 0.6961),
        ("parameters", {"act": "lk_swish"}, 0.7146, 0.7368),
        ("allcnn", {"act": "relu", "schedule": "fixed", "width": 96}, 0.317, 0.9301),
        ("resnet50", {"act": "lk_relu", "link": "inside"}, 0.7656, 0.9048),
        ("resnet50", {"act": "lk_relu_bn", "link": "inside"}, 0.7176, 0.9027),
        ("resnet50", {"act": "relu_bn", "link": "inside"}, 0.6479, 0.8973),
    ],
)
def test_some_numbers(name, cell, paper, later):
    assert published(name, cell) == {"paper": paper, "later": later}


OTHERS = {
    "width": {"width": 51},
    "depth": {"depth": 49, "width": 4},
    "allcnn": {"schedule": "step", "width": 24},
    "covariate_shift": {"inputs": "raw", "depth": 50},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_sizes_and_other_tables_were_not_printed(name):
    assert published(name, {"act": "relu", **OTHERS[name]}) == {"paper": None, "later": None}


@pytest.mark.parametrize("name", MODULES)
def test_a_net_that_they_did_not_train_has_no_number(name):
    """Each net's number is its own: adding _sqrt2 or _bn to its name is another net."""
    nets = paper_nets(name)
    names = {net["act"] for net in nets}
    for net, changed in itertools.product(nets, ("{}_sqrt2", "{}_bn", "{}_sqrt2_bn", "lk_{}")):
        act = changed.format(net["act"])
        if act not in names:
            assert published(name, {**net, "act": act}) == {"paper": None, "later": None}, act


def test_times_are_relative_to_the_linked_net_without_batch_norm():
    assert published_time("lk_relu") == {"paper": 1.0, "later": 1.0}
    assert published_time("selu_bn") == {"paper": 2.376538, "later": 2.07}
    assert published_time("relu") == {"paper": None, "later": None}
