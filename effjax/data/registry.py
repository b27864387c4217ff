"""The registered data sets: what each must hold, its licence, and where the hub has it. Data only."""

from collections.abc import Mapping
from typing import NamedTuple

__all__: list[str] = []

_RESEARCH = "research use only, not redistributable"


class Spec(NamedTuple):
    """What a registered set must hold; a column ending in ``?`` may be absent."""

    modality: str
    columns: str
    licence: str
    classes: int = 0
    image: tuple[int, int, int] | None = None
    hub: str = ""
    hub_columns: Mapping[str, str] = {}


def _image(height: int, channels: int, classes: int, licence: str, hub: str = "", **hub_columns: str) -> Spec:
    return Spec("image", "image label orig_index?", licence, classes, (height, height, channels), hub, hub_columns)


def _text(columns: str, classes: int = 0, licence: str = _RESEARCH, hub: str = "", **hub_columns: str) -> Spec:
    return Spec("text", columns, licence, classes, None, hub, hub_columns)


_PAIR = "sentence1 sentence2 label"
GRAPHS = [
    "actor",
    "amazon_computers",
    "amazon_photo",
    "chameleon_musae",
    "citeseer",
    "citeseer_attacked",
    "coauthor_cs",
    "coauthor_physics",
    "cora",
    "cora_attacked",
    "cora_ml",
    "cora_ml_attacked",
    "cornell",
    "dblp",
    "polblogs_attacked",
    "pubmed",
    "squirrel_musae",
    "texas",
    "wisconsin",
]
SPECS: dict[str, Spec] = {
    "digits": _image(8, 1, 10, "BSD-3-Clause (scikit-learn)"),
    "fashion_mnist": _image(28, 1, 10, "MIT", "zalando-datasets/fashion_mnist"),
    "mnist": _image(28, 1, 10, "not stated; usually given as CC BY-SA 3.0", "ylecun/mnist"),
    "cifar10": _image(32, 3, 10, _RESEARCH, "uoft-cs/cifar10", img="image"),
    "cifar100_sample": _image(32, 3, 100, _RESEARCH),
    "imagenet_sample128": Spec("image", "image label wnid?", _RESEARCH, 1000, (128, 128, 3)),
    "sst2": _text("sentence label", 2, hub="stanfordnlp/sst2"),
    "glue/cola": _text("sentence label", 2, hub="nyu-mll/glue:cola"),
    "glue/mrpc": _text(_PAIR, 2, hub="nyu-mll/glue:mrpc"),
    "glue/qnli": _text("question sentence label", 2, hub="nyu-mll/glue:qnli"),
    "glue/rte": _text(_PAIR, 2, hub="nyu-mll/glue:rte"),
    "glue/stsb": _text("sentence1 sentence2 score", hub="nyu-mll/glue:stsb", label="score"),
    "glue/wnli": _text(_PAIR, 2, hub="nyu-mll/glue:wnli"),
    "superglue/boolq": _text("question passage label", 2),
    "superglue/cb": _text("premise hypothesis label", 3),
    "superglue/copa": _text("premise choice1 choice2 question label", 2),
    "superglue/multirc": _text("paragraph question answer label", 2),
    "superglue/wic": _text("word sentence1 sentence2 label", 2),
    "superglue/wsc": _text("text span1_text span1_index span2_text span2_index label", 2),
    "ag_news": _text("text label", 4, hub="fancyzhx/ag_news"),
    "trec": _text("text label", 6, "not stated"),
    "imdb2k": _text("text label", 2),
    "sms_spam": _text("text label", 2, "free for all purposes"),
    "ptb": _text("text", licence="LDC, not redistributable"),
    "wikitext2": _text("text", licence="CC BY-SA 3.0", hub="Salesforce/wikitext:wikitext-2-v1"),
    "tiny_shakespeare": _text("text", licence="public domain"),
    "cmudict": _text("word phones", licence="CMU (BSD-like)"),
    "fsdd": Spec("audio", "audio_mulaw n_samples label speaker take?", "CC BY-SA 4.0", 10),
    "hmp_accel": Spec("series", "acc length label volunteer?", _RESEARCH, 14),
    **{f"graphs/{name}": Spec("graph", "", "see the licence table of the graph folder") for name in GRAPHS},
    "graphs/cora": Spec("graph", "", "MIT (repackaged by tkipf/gcn and kimiyoung/planetoid)"),
    "graphs/citeseer": Spec("graph", "", "MIT (repackaged by tkipf/gcn and kimiyoung/planetoid)"),
}
NAMES: tuple[str, ...] = tuple(sorted(SPECS))
BUILTIN_NAMES: tuple[str, ...] = (
    "digits",
    "fashion_mnist",
    "fsdd",
    "graphs/citeseer",
    "graphs/cora",
    "sms_spam",
    "tiny_shakespeare",
)
