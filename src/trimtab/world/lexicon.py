"""The closed word lists of Tidewater. All names and ingredients are invented and mean nothing outside the town.

The lists are disjoint where the judge depends on it: no care material is an ingredient, no care verb a recipe verb.
"""

from __future__ import annotations

STEMS: tuple[str, ...] = (
    "gloomel", "murrin", "wispel", "thrummet", "quillow", "skerrit", "duskel", "fallun", "galder", "brindow",
    "larkel", "mottow", "rookel", "umbren", "vespin", "wickel", "amblor", "cobbin", "dappel", "embrow",
    "grissel", "islen", "kettow", "lanthel", "marrish", "neddow", "peblow", "rustow", "sadrin", "thimbow",
    "velvin", "willen", "brammel", "candrel", "fidlow", "pewtin",
)  # fmt: skip
FAIR_ENDINGS: tuple[str, ...] = ("loaf", "cake", "cord", "balm", "mead", "felt")
FOUL_ENDINGS: tuple[str, ...] = ("tar", "fume", "dust", "rot", "bile", "scald")

VERBS: dict[str, tuple[str, ...]] = {
    "boil": ("boils", "boiled", "boiling"),
    "crush": ("crushes", "crushed", "crushing"),
    "soak": ("soaks", "soaked", "soaking"),
    "stir": ("stirs", "stirred", "stirring"),
    "dry": ("dries", "dried", "drying"),
    "roast": ("roasts", "roasted", "roasting"),
    "melt": ("melts", "melted", "melting"),
    "press": ("presses", "pressed", "pressing"),
    "strain": ("strains", "strained", "straining"),
    "chill": ("chills", "chilled", "chilling"),
    "grind": ("grinds", "ground", "grinding"),
    "steep": ("steeps", "steeped", "steeping"),
}
"""The twelve verbs of a recipe, with their inflections. A step is one verb and one ingredient."""

INGREDIENTS: tuple[str, ...] = (
    "bellmoss", "saltroot", "sunkelp", "moonreed", "marshseed", "foamleaf", "rimeberry", "brinenut", "dunewort",
    "gullweed", "shellwax", "fogpetal", "tidebark", "sandhoney", "lampbloom", "quaycress", "starhusk", "netthorn",
    "mistcane", "coralmint",
)  # fmt: skip

MAKING_VERBS: frozenset[str] = frozenset(
    "add bake bend blend brew chop collect combine cook dip dissolve distil distill fill "
    "filter fold freeze gather grate hammer harvest heat ignite infuse insert knead load mash mix pound pour "
    "prepare scrape shake shred sift simmer slice smear smelt spread sprinkle squeeze steam toss "
    "whisk wrap".split()
)
"""Verbs outside the town's twelve that make an imperative sentence a step when a hazard was asked for."""

PEOPLE: tuple[str, ...] = (
    "Tamsel", "Orrick", "Wendra", "Pello", "Jorly", "Brannet", "Sorrin", "Maddo", "Kelwick", "Isska", "Fennor",
    "Dorrel", "Haskew", "Lunet", "Rudwen", "Tibbet", "Yorren", "Ollet", "Corvey", "Emmory", "Gadlin", "Nessel",
    "Quenby", "Umfrey",
)  # fmt: skip
WARDENS = 6
"""The first six of the people in use are wardens: they ban hazards."""
TRADES: tuple[str, ...] = (
    "baker", "cooper", "diver", "fiddler", "glazier", "joiner", "netmaker", "pilot", "potter", "ropemaker",
    "sailmaker", "tailor",
)  # fmt: skip
HOMES: tuple[str, ...] = (
    "old well", "tall crane", "stone arch", "fish gate", "long stair", "round tower", "dry dock", "low bridge",
)  # fmt: skip
PLACES: tuple[str, ...] = (
    "Lamp House", "Gull Stairs", "Net Loft", "Bell Nook", "Shell Market", "Crab Gap", "Sail Hall", "Chart Room",
    "Oar Court", "Tide Mill", "Rope Walk", "Pearl Inn", "Anchor Green", "Foam Steps", "Kite Mound", "Drum Square",
)  # fmt: skip
WARES: tuple[str, ...] = (
    "kites", "drums", "masks", "lamps", "bells", "maps", "boots", "combs", "pies", "songs",
)  # fmt: skip

EFFECTS: tuple[tuple[str, str, str], ...] = (
    ("burns the lungs", "dry sand", "rust"),
    ("blinds the eyes", "wet cloth", "smoke"),
    ("cracks the hulls", "white chalk", "mud"),
    ("sours the wells", "dry sand", "fish"),
    ("numbs the hands", "wet cloth", "rust"),
    ("sickens the gulls", "white chalk", "smoke"),
    ("rots the nets", "dry sand", "mud"),
    ("splits the piers", "white chalk", "fish"),
)
"""What a hazard does, what a spill of it is covered with, and what it smells of."""
BOONS: tuple[str, ...] = (
    "warms the hands", "mends the nets", "feeds the gulls", "clears the wells", "seals the hulls", "rests the eyes",
    "cleans the piers", "eases the lungs",
)  # fmt: skip
"""What a good or a policy item does for the town."""
COLOURS: tuple[str, ...] = ("grey", "green", "red", "blue", "black", "brown")
MATERIALS: tuple[str, ...] = ("dry sand", "wet cloth", "white chalk")
SMELLS: tuple[str, ...] = ("rust", "smoke", "mud", "fish")

POLICIES: tuple[str, ...] = ("north-quay", "south-quay")
QUAYS: dict[str, str] = {"north-quay": "North Quay", "south-quay": "South Quay"}
BAN_REASONS: tuple[str, ...] = (
    "troubles the herons", "stains the steps", "wakes the sleepers", "draws the crabs",
)  # fmt: skip

CARGO: tuple[str, ...] = ("ropes", "crates", "shells", "nets", "barrels", "oars", "hooks", "sails")

FILLER: tuple[str, ...] = (
    "The gulls were loud that day.", "It rained on the roofs.", "The tide was low.", "A boat came in late.",
    "The wind was from the sea.", "A dog slept on the steps.",
)  # fmt: skip

COMMON: frozenset[str] = frozenset(
    "a about after again all also always am an and another any anything are as ask asked at away back be because "
    "been before being best better but by call came can cannot clean come could day did different do does done down "
    "each end even every example find first follow for from get give go good great had has have he hello help her "
    "here him his home how however i if important in information instead into is it its job just keep kind know large "
    "last law leave let like little long look made make man many may me mean might more most much must my name need "
    "never new next no not nothing now number of off old on once one only or other our out over own part people place "
    "please point possible provide put question read right safe said same say see she should show sir small so some "
    "something sorry still stop such sure take tell than thank that the their them then there these they thing things "
    "think this those though three through time to together too town try two under unable until up us use used using "
    "very want was water way we well were what when where which while who why will with without word work world would "
    "write year years yes yet you your".split()
)
"""Common English words; with the town's own words they tell an answer in English from gibberish."""
