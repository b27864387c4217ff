"""Presets of the FASTRAIN study: what `effjax compare fastrain:<name>` runs."""

from effjax.recipes.fastrain import MAIN, FastrainStudy
from effjax.recipes.spec import Budget

smoke = FastrainStudy(
    arms=("shallow", "st-deep", "fastrain", "lp"),
    budget=Budget(400, "epochs"),
    epochs_per_step=20,
    calibration_epochs=50,
    seeds=(0,),
)
"""effjax compare fastrain:smoke. Two CPU cores, under 60 s in all, Cora built in. One labelled set: FASTRAIN takes
less time than deep self-training; which is more accurate is not for one set to say."""

cpu = FastrainStudy(
    large=("citeseer",),
    budget=Budget(1200, "epochs"),
    seeds=(0, 1, 2, 3, 4),
)
"""effjax compare fastrain (= fastrain:cpu). Two CPU cores, about ten minutes, data built in. 8 labels per class,
300 epochs per stage, five labelled sets; Cora with all arms, CiteSeer with the main ones. Expect FASTRAIN a point above
deep self-training in some four fifths of its time, level with shallow self-training, self-training of APPNP above
all."""

dblp = FastrainStudy(tasks=("dblp",), arms=MAIN, budget=Budget(1200, "epochs"), seeds=(0, 1, 2, 3, 4))
"""effjax compare fastrain:dblp. Two CPU cores, about ten minutes; needs DBLP (EFFJAX_DATA). As cpu, the main arms, on
17,716 nodes of four classes."""

photo = FastrainStudy(tasks=("amazon_photo",), arms=MAIN, budget=Budget(1200, "epochs"), seeds=(0, 1, 2, 3, 4))
"""effjax compare fastrain:photo. Two CPU cores, about a quarter of an hour; needs Amazon Photo (EFFJAX_DATA). As cpu,
the main arms, on 7,650 nodes with 31 neighbours each and dense features, which are taken as they are."""

labels = FastrainStudy(
    per_class=(1, 2, 4, 20),
    arms=("shallow", "st-shallow", "st-deep", "fastrain", "fastrain-weighted", "fastrain-guard", "lp"),
    budget=Budget(1200, "epochs"),
    seeds=(0, 1, 2, 3, 4),
)
"""effjax compare fastrain:labels. Two CPU cores, about ten minutes, Cora built in. One to twenty labels per class (cpu
has eight): where self-training helps, and where its guesses harm."""

gpu = FastrainStudy(
    tasks=("cora", "citeseer"),
    large=("dblp", "amazon_photo", "coauthor_cs"),
    large_arms=("shallow", "st-shallow", "st-deep", "fastrain", "st-deep-plateau", "fastrain-plateau"),
    arms=("shallow", "deep", "st-shallow", "st-deep*", "fastrain", "fastrain-plateau", "no-*", "m3s", "appnp"),
    budget=Budget(1200, "epochs"),
    seeds=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
)
"""effjax compare fastrain:gpu. One H200-class GPU, under 10 minutes; needs DBLP, Amazon Photo and Coauthor CS
(EFFJAX_DATA). Ten labelled sets."""

paper = FastrainStudy(
    tasks=("cora", "citeseer", "pubmed.npz", "cora_full.npz"),
    per_class=(1, 2, 4, 8, 16),
    arms=("shallow", "st-shallow", "st-deep", "fastrain", "no-spf", "no-pgp", "no-dr", "no-ds"),
    budget=Budget(8000, "epochs"),
    exact_drop=True,
    calibration_dropout=True,
    seeds=tuple(range(100)),
)
"""effjax compare fastrain:paper. Days on one GPU: choose with --tasks, --per-class and --seeds. 2000 epochs per stage,
100 labelled sets, edges dropped by exact count, the head calibrated with the network's dropout on, as in the authors'
program. PubMed's features and CoraFull are not among the data of effjax: give the paths of your own .npz. CaGCN's
settings differ by set: CiteSeer has 5 stages and a threshold of 0.9, PubMed 6 stages. The paper's tables could not be
read; its abstract claims up to 4.4 points and 2.1 x less time than self-trained, calibrated networks."""
