"""Presets of the GEENI study: what `effjax compare geeni:<name>` runs."""

from effjax.recipes.geeni import GeeniStudy
from effjax.recipes.spec import Budget

FIVE = (0, 1, 2, 3, 4)
ATTACKED = ("cora_attacked/meta_0.15", "citeseer_attacked/meta_0.15")

smoke = GeeniStudy(
    tasks=("cora",),
    forms=("single", "narrow", "correct-smooth", "geeni-learned", "oracle"),
    modes=("full",),
    budget=Budget(100, "epochs"),
    seeds=(0,),
)
"""effjax compare geeni:smoke. Two CPU cores, under 60 s in all. Cora: the ensemble above one network, the ORACLE above
both, the learned detector between them."""

cpu = GeeniStudy(tasks=("cora", "citeseer", ATTACKED[0]), budget=Budget(200, "epochs"), seeds=FIVE)
"""effjax compare geeni (= geeni:cpu). Two CPU cores, some ten minutes; needs the attacked graphs (EFFJAX_DATA). On
clean graphs expect a point from the ensemble, at most one more from isolation, and 2 to 4 from the ORACLE; on the
poisoned graph 4 to 5 from isolation by the learned detector, nothing by the score."""

large = GeeniStudy(
    tasks=("amazon_photo", "dblp"),
    forms=("single", "correct-smooth", "ensemble", "narrow", "geeni-score", "geeni-learned", "geeni-soft", "oracle"),
    budget=Budget(200, "epochs"),
    seeds=FIVE,
)
"""effjax compare geeni:large. Two CPU cores, some twenty minutes; needs EFFJAX_DATA. Graphs of 8 and 18
thousand nodes."""

gpu = GeeniStudy(
    tasks=("amazon_computers", "coauthor_physics", *ATTACKED),
    members=8,
    budget=Budget(200, "epochs"),
    seeds=tuple(range(10)),
)
"""effjax compare geeni:gpu. One H200-class GPU, under 10 minutes; needs EFFJAX_DATA. Eight members of width 8."""

paper = GeeniStudy(
    tasks=("cora", "citeseer", "amazon_computers", "coauthor_physics", "coauthor_cs", *ATTACKED),
    budget=Budget(200, "epochs"),
    seeds=tuple(range(10)),
)
"""effjax compare geeni:paper. An hour on a GPU; needs EFFJAX_DATA. The paper's data sets, networks and numbers of
members are unknown; its abstract claims up to 4.6 points over one network and 3.8 over the ensemble."""
