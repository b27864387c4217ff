"""Presets of the GEENI study: what `effjax compare geeni:<name>` runs."""

from effjax.recipes.geeni import GeeniStudy
from effjax.recipes.spec import Budget

FIVE = (0, 1, 2, 3, 4)
ATTACKED = ("cora_attacked/meta_0.15", "citeseer_attacked/meta_0.15")

smoke = GeeniStudy(
    tasks=("cora",),
    arms=("single", "narrow", "correct-smooth", "geeni-learned", "oracle"),
    modes=("full",),
    budget=Budget(100, "epochs"),
    seeds=(0,),
)
"""effjax compare geeni:smoke. Two CPU cores, under 60 s in all. Cora: the ensemble above one network, the ORACLE above
both, the learned detector between them."""

cpu = GeeniStudy(
    tasks=("cora", ATTACKED[0]),
    arms=(
        *("single", "correct-smooth", "jaccard", "distilled", "ensemble", "narrow", "narrow-folded"),
        *("narrow-correct-smooth", "geeni-score", "geeni-learned", "geeni-soft", "geeni-distilled"),
        *("geeni-correct-smooth", "oracle"),
    ),
    budget=Budget(200, "epochs"),
    seeds=FIVE,
)
"""effjax compare geeni (= geeni:cpu). Two CPU cores, some ten minutes; needs the attacked graph (EFFJAX_DATA). Cora,
clean and poisoned by Metattack. Expect little from isolation on the clean graph, 4 to 5 points on the poisoned one by
the learned detector and nothing by the score; 2 to 6 from the ORACLE."""

large = GeeniStudy(
    tasks=("citeseer", "amazon_photo"),
    arms=(
        *("single", "correct-smooth", "distilled", "ensemble", "narrow", "narrow-folded"),
        *("geeni-score", "geeni-learned", "geeni-distilled", "oracle"),
    ),
    budget=Budget(200, "epochs"),
    seeds=FIVE,
)
"""effjax compare geeni:large. Two CPU cores, some twenty minutes; needs EFFJAX_DATA. More clean graphs. Expect narrow
members below one network on Amazon Photo, and level with it or above where the wide ensemble has taught them."""

rivals = GeeniStudy(tasks=("cora", *ATTACKED), budget=Budget(200, "epochs"), seeds=FIVE)
"""effjax compare geeni:rivals. Two CPU cores, half an hour; needs EFFJAX_DATA. Every arm, among them the wide network,
edge subsets at test time, a network distilled from the ensemble, every detector, and members on denoised edges."""

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
