"""What each notebook computes at a profile's values: its tables, their points, and their texts.

One function a notebook, after the calls in its cells. A test holds the numbers of points, and what
they are measured on, against the records of the committed results. Where results decide which
points there are, as many as there can be are counted. Tables stand with the notebook that owns
them; those that it reads from another one are that one's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pruning_utils import selection
from pruning_utils.shrinking import orders, whole
from pruning_utils.studies import depth, recipes
from pruning_utils.studies.shapes import shapes_of_heads
from pruning_utils.studies.shots import ends_of

# What looks at all embedded models at hand, where no other is named.
EVERY_MODEL = (
    "01_layer_similarity",
    "02_depth_and_question_answering",
    "03_depth_and_next_token_loss",
    "04_simple_against_similarity",
    "05_robustness",
    "06_block_importance",
    "07_depth_against_width",
    "08_lora_against_continued_pretraining",
    "09_seven_metrics",
    "10_how_to_heal",
    "11_one_shot_or_iterative",
)
N_RULES = 13  # of studies.sets.metric_sets, without the random sets
WAYS = {
    "LoRA": "lora",
    "QLoRA": "qlora",
    "DoRA": "dora",
    "all weights": "full",
    "head": "last_layers last_k=0 untie=true",
    "head + 1": "last_layers last_k=1 untie=true",
    "head + 2": "last_layers last_k=2 untie=true",
    "head + 3": "last_layers last_k=3 untie=true",
    "head + 3, tied": "last_layers last_k=3 untie=false",
}
TRIAL_SEED = 100
# Keys of healing that are no settings of the trainings of 08.
COMPARED_IN_08 = ("rates", "timed", "first_steps", "chained_depths", "equal_steps")
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """A model that a study measures.

    Attributes:
        cut: What chose the layers that go; models with the same name lack the same ones.
        n_dropped: How many go.
        recipe: How it is trained, as :class:`recipes.Recipe` reads it; "" for not at all. Its rate
            may stand for the best one.
        seed: Of the training.
        shots: Of its questions, where they are not those of the table.
        per_round: Layers that go at a time, with training in between; 0: all at once.
    """

    cut: str = ""
    n_dropped: int = 0
    recipe: str = ""
    seed: int = 0
    shots: int | None = None
    per_round: int = 0


@dataclass(frozen=True)
class Table:
    """What a sweep computes.

    Attributes:
        name: Behind the model's name in that of the table.
        kind: ``study``; or what else its points are, ``scan``, ``score``, ``sample``, ``floor``,
            ``speed``, ``memory``, ``cost``, ``release`` or ``other`` (seconds at most).
        points: The models of a study, or plain values.
        is_most: Whether results decide which of these points there are.
        model: Another model than the notebook's.
        texts: Windows of each evaluation text.
        tasks: Shots of each task.
        limit: Questions of each task; None: all.
        seq_len: Tokens in a window.
        n_calibration: Windows that the closest block is chosen on; 0 for none.
        healing: Keywords of healing.heal that all points share.
        source: Text to heal on.
        dtype: Of the weights.
        settings: What a kind needs besides.
    """

    name: str
    kind: str
    points: tuple
    is_most: bool = False
    model: str = ""
    texts: Values = field(default_factory=dict)
    tasks: Values = field(default_factory=dict)
    limit: int | None = None
    seq_len: int = 0
    n_calibration: int = 0
    healing: Values = field(default_factory=dict)
    source: str | None = None
    dtype: str = "auto"
    settings: Values = field(default_factory=dict)


def tables_of(
    notebook: str, values: Values, n_layers: int, *, is_second: bool = False
) -> list[Table]:
    """The tables that a notebook computes.

    Args:
        notebook: Its name.
        values: Its parameters, all of them.
        n_layers: Of its model.
        is_second: Whether the model is not the first of those that the notebook looks at; some
            notebooks ask it for less.

    Raises:
        ValueError: For a notebook of which nothing is known here.
    """
    if notebook not in NOTEBOOKS:
        raise ValueError(f"notebook must be one of {', '.join(NOTEBOOKS)}, got {notebook!r}")
    found = OF_SECOND.get(notebook, NOTEBOOKS[notebook]) if is_second else NOTEBOOKS[notebook]
    return found(values, n_layers)


def quickstart(values: Values, n_layers: int) -> list[Table]:
    healing = values["healing"]
    dropped = values["depths"][0]
    stages = ("", f"{healing['method']} {healing['learning_rate']} {healing['steps']}")
    points = [Point()] + [Point("closest block", dropped, recipe) for recipe in stages]
    scored = values["scored_on"]
    found = Table(
        "",
        "study",
        tuple(points),
        texts={"evaluation": scored["n_windows"]},
        tasks={"piqa": 0},
        limit=scored["n_questions"],
        seq_len=values["text"]["seq_len"],
        n_calibration=values["text"]["n_samples"],
        healing=healing,
        dtype=values["dtype"],
    )
    return [found]


def layer_similarity(values: Values, n_layers: int) -> list[Table]:
    text = values["text"]
    precisions = values["precisions"]
    points = [(source, precisions[0]) for source in text["sources"]]
    points += [(text["sources"][0], precision) for precision in precisions[1:]]
    settings = {"n_samples": text["n_samples"]}
    found = Table(
        "", "scan", tuple(points), seq_len=text["seq_len"], dtype=values["dtype"], settings=settings
    )
    return [found]


def question_answering(values: Values, n_layers: int) -> list[Table]:
    scored, sweep = values["scored_on"], values["sweep"]
    last = depth.layers_in(sweep["to"], n_layers)
    tenth, quarter = (depth.layers_in(share, n_layers) for share in values["shares"])
    curves = unhealed(depth.every(sweep["step"], last), depth.THREE_RULES)
    more = unhealed([0, tenth], depth.THREE_RULES)
    more += unhealed(sorted({quarter, last} - {tenth}), ["similarity"])
    chosen = of_block(values, tasks=scored["tasks"])
    papers = replace(chosen, n_calibration=0, tasks=scored["papers"])
    limit, many = scored["n_questions"], scored["more_questions"]
    every = [task for task in [*scored["tasks"], *scored["papers"]] if task != "winogrande"]
    control = values["control"]
    starts = range(min(control["blocks"], n_layers - tenth + 1))
    blocks = tuple(Point(f"{tenth} at place {start}", tenth) for start in starts)
    at_random = replace(chosen, n_calibration=0, limit=control["n_questions"])
    return [
        replace(chosen, name="unhealed", points=curves, limit=limit),
        replace(chosen, name="answers", points=more, limit=many),
        replace(at_random, name="blocks", points=blocks),
        replace(papers, name="papers", points=(Point(),), limit=many),
        Table("floors", "floor", tuple(every), limit=many, dtype=values["dtype"]),
    ]


def next_token_loss(values: Values, n_layers: int) -> list[Table]:
    scored, sweep = values["scored_on"], values["sweep"]
    last = depth.layers_in(sweep["to"], n_layers)
    placed = depth.layers_in(sweep["placed"], n_layers)
    cuts = depth.numbers_in(values["shares"], n_layers)
    depths = sorted({*depth.every(sweep["step"], last), *cuts})
    chosen = of_block(values, texts=scored["texts"])
    trained = healed(values["healing"], cuts, ["similarity"], values["seeds"])
    places = [
        Point(f"{size} from {start}", size)
        for size in sorted({1, placed})
        for start in range(n_layers - size + 1)
    ]
    tried = replace(chosen, n_calibration=0, texts=scored["fewer"])
    return [
        replace(chosen, name="losses", points=unhealed(depths, depth.THREE_RULES)),
        replace(chosen, name="healed", points=trained),
        replace(tried, name="beginnings", points=(Point(),), texts={"xsum": 16}),
        replace(tried, name="places", points=tuple(places)),
        Table(
            "distances",
            "scan",
            ((values["text"]["source"], values["dtype"]),),
            seq_len=values["text"]["seq_len"],
            dtype=values["dtype"],
            settings={"n_samples": values["text"]["n_samples"]},
        ),
    ]


def simple_rule(values: Values, n_layers: int) -> list[Table]:
    found, sweep = both_rules(values, n_layers), values["sweep"]
    quarter = depth.layers_in(sweep["compared"], n_layers)
    last = depth.layers_in(sweep["to"], n_layers)
    others = [cut for cut in depth.numbers_in(sweep["answered"], n_layers) if cut != quarter]
    both = [cut for cut in depth.numbers_in(sweep["judged"], n_layers) if cut in others]
    more = unhealed(both, depth.RULES)
    more += healed(values["healing"], others, depth.RULES, values["seeds"])
    if both and last not in {quarter, *both}:
        more += unhealed([last], ["similarity"])
    if more:
        answers = found[-1]
        found.append(replace(answers, name="more-answers", texts={}, points=more))
        found += at_own_rates(values, replace(answers, texts={}), both)
    return found


def at_own_rates(values: Values, answers: Table, cuts: list[int]) -> list[Table]:
    """The rates that notebook 04 tries at these cuts, and the models that it heals at others."""
    healing = values["healing"]
    if not cuts or not healing["rates"]:
        return []
    tried = [
        point
        for rate in healing["rates"]
        for point in healed({**healing, "learning_rate": rate}, cuts, depth.RULES, [TRIAL_SEED])
    ]
    own = healed(healing, cuts, depth.RULES, values["seeds"])
    return [
        replace(answers, name="rates", tasks={}, limit=None, points=tuple(tried)),
        replace(answers, name="own-rates", points=own, is_most=True),
    ]


def both_rules(values: Values, n_layers: int) -> list[Table]:
    """What notebook 04 asks every model."""
    scored, sweep = values["scored_on"], values["sweep"]
    healing, seeds = values["healing"], values["seeds"]
    quarter = depth.layers_in(sweep["compared"], n_layers)
    answering = unhealed([0, quarter], depth.RULES) + healed(healing, [quarter], depth.RULES, seeds)
    found = replace(
        of_block(values, texts=scored["texts"], tasks=scored["tasks"]),
        name="answers",
        points=answering,
        limit=scored["more_questions"],
    )
    if sweep["curves_of"] != values["profile"]:
        return [found]
    cuts = depth.numbers_in(sweep["healed"], n_layers)
    of_curves = {**healing, **sweep["healing"]}
    curves = replace(
        of_block(values, texts=scored["fewer"]),
        name="healed",
        points=healed(of_curves, cuts, ["deepest"], seeds),
        healing=without(of_curves, "own_rates", "rates"),
        dtype=sweep["dtype"],
    )
    return [curves, found]


def robustness(values: Values, n_layers: int) -> list[Table]:
    scored, shots = values["scored_on"], values["shots"]
    seeds, healing = values["seeds"], values["healing"]
    first, rates = depth.layers_in(values["share_removed"], n_layers), healing["rates"]
    method, steps = healing["method"], healing["steps"]
    ranks = sorted([*healing["other_ranks"], healing["rank"]])
    whole = of_block(values, texts=scored["texts"], tasks=scored["tasks"])
    whole = replace(whole, limit=scored["n_questions"])

    def ranked(seed: int, rank: int, rate: float) -> Point:
        """A model without that share with adapters of a rank."""
        recipe = f"{recipes.recipe_at(method, rate, steps)} rank={rank}"
        return Point("similarity", first, recipe, seed)

    asked = [
        Point(
            "similarity" if gone else "none",
            gone,
            plain_recipe(healing) if gone else "",
            values["seed"],
            shots=count,
        )
        for gone in (0, first)
        for count, _ in shots["counts"]
    ]
    own = [ranked(seed, rank, rates[0]) for rank in ranks for seed in seeds]
    others = [
        ranked(seed, rank, healing["learning_rate"])
        for rank in healing["other_ranks"]
        for seed in seeds
    ]
    trials = [ranked(TRIAL_SEED, rank, rate) for rank in ranks for rate in rates]
    bare = replace(whole, texts={}, tasks={}, limit=None)
    return [
        replace(bare, name="rates", points=tuple(trials)),
        replace(whole, name="ranks", points=tuple(others)),
        replace(
            bare,
            name="shots",
            points=tuple(asked),
            tasks=shots["tasks"],
            limit=shots["n_questions"],
        ),
        replace(whole, name="own-rates", points=tuple(own), is_most=True),
    ]


def orders_of_shots(values: Values, n_layers: int) -> list[Table]:
    """What notebook 05 asks a second model: the fewest shots, and each order of the most."""
    shots = values["shots"]
    ends = ends_of(shots["counts"])
    asked = [Point("none", shots=count) for count, _ in shots["counts"] if count in ends]
    limit = values["scored_on"]["n_questions"]
    whole = replace(of_block(values), healing={}, n_calibration=0, limit=limit)
    return [replace(whole, name="shots", points=tuple(asked), tasks=shots["tasks"])]


def block_importance(values: Values, n_layers: int) -> list[Table]:
    scored, healing = values["scored_on"], values["healing"]
    rates, seeds, seed = healing["rates"], values["seeds"], values["seed"]
    rivals = [(rule, values["depths"][0]) for rule in ("perplexity", "taylor+")]
    criteria = ("magnitude", "magnitude L2", "taylor", "perplexity")
    sets = [
        (f"{criterion}{mark}", n)
        for criterion in criteria
        for mark in ("", "+")
        for n in values["depths"]
    ]
    best = middle("lora", rates, healing["steps"])
    own = of_scores(values)
    drawn = [Point(*one) for one in sets]
    mended = [Point(*one, best, seed) for one in sets if "L2" not in one[0]]
    again = [Point(*one, best, draw) for draw in seeds if draw != seed for one in rivals]
    asked = [Point(*one) for one in rivals]
    asked += [Point(*one, best, draw) for draw in seeds for one in rivals]
    return [
        scores(values),
        replace(
            bare(own), name="rates", points=trials((*one, "lora", rates) for one in rivals)(healing)
        ),
        replace(own, name="sets", points=(Point(), *drawn, *mended, *again), is_most=True),
        replace(
            own,
            name="answers",
            points=(Point(), *asked),
            texts={},
            limit=scored["more_questions"],
        ),
    ]


def unhealed_importance(values: Values, n_layers: int) -> list[Table]:
    """What notebook 06 asks a second model: the pairs of B1 and B5, in the shares of the first."""
    texts = {name: n for name, n in values["scored_on"]["texts"].items() if ":" not in name}
    of_first = depth.SIZES["smollm2-135m"].n_layers
    depths = [depth.layers_in(n / of_first, n_layers) for n in values["depths"]]
    least = ("perplexity", "taylor+", "magnitude", "magnitude+")
    pairs = [Point(rule, depths[0]) for rule in least]
    # Protection changes Taylor's set at one of the depths.
    pairs += [Point(rule, depths[-1]) for rule in ("taylor", "taylor+")]
    own, drawn = bare(of_scores(values)), scores(values)
    return [
        replace(drawn, points=drawn.points[:1]),
        replace(own, name="unhealed", points=(Point(), *pairs), is_most=True, texts=texts),
    ]


def depth_or_width(values: Values, n_layers: int) -> list[Table]:
    scored, healing, shapes = values["scored_on"], values["healing"], values["shapes"]
    sizes = [("unpruned", 0)] + [(shape, n) for n in values["depths"] for shape in shapes]
    batches, prompts, speed = scored["batch_sizes"], scored["prompts"], scored["speed"]
    timed = [(*size, batch, prompt) for prompt in prompts for batch in batches for size in sizes]
    ends = {batches[0], batches[-1]}
    held = [one for one in timed if one[2] in ends and one[3] == max(prompts)]
    judged = [(shape, values["depths"][0]) for shape in list(shapes)[:2]]
    own = of_scores(values)
    rates = healing["rates"]
    best = middle("lora", rates, healing["steps"])
    trained = [("", values["seed"]), *((best, draw) for draw in values["seeds"])]
    quality = [Point(*one, recipe, seed) for one in judged for recipe, seed in trained]
    once = {"warmups": 0, "repeats": 1, "new_tokens": speed["new_tokens"]}
    return [
        Table("sizes", "other", tuple(sizes)),
        Table("speed", "speed", tuple(timed), dtype=speed["dtype"], settings=speed),
        in_rounds(scored, sizes),
        Table("memory", "memory", tuple(held), dtype=speed["dtype"], settings=once),
        replace(
            bare(own), name="rates", points=trials((*one, "lora", rates) for one in judged)(healing)
        ),
        replace(own, name="quality", points=(Point(), *quality)),
    ]


def times_of_shapes(values: Values, n_layers: int) -> list[Table]:
    """What notebook 07 asks a second model: times for one text, in the shares of the first."""
    scored = values["scored_on"]
    of_first = depth.SIZES["smollm2-135m"]
    # No two embedded models have equally many layers.
    heads = {size.n_layers: size.n_kv_heads for size in depth.SIZES.values()}
    depths = [depth.layers_in(n / of_first.n_layers, n_layers) for n in values["depths"]]
    its_shapes = shapes_of_heads(values["shapes"], of_first.n_kv_heads, heads[n_layers])
    sizes = [("unpruned", 0)] + [(shape, n) for n in depths for shape in its_shapes]
    return [Table("sizes", "other", tuple(sizes)), in_rounds(scored, sizes)]


def in_rounds(scored: Values, sizes: list[tuple[str, int]]) -> Table:
    """Times for one text, of each shape in each round, one run of a process each."""
    speed, batch = scored["speed"], scored["batch_sizes"][0]
    once = [(*size, batch, prompt) for prompt in scored["prompts"] for size in sizes]
    settings = {**speed, "repeats": 1}
    points = tuple(scored["rounds"] * once)
    return Table("rounds", "speed", points, dtype=speed["dtype"], settings=settings)


def adapters_or_all(values: Values, n_layers: int) -> list[Table]:
    healing, depths, seeds = values["healing"], values["depths"], values["seeds"]
    rates, steps, timed = healing["rates"], healing["steps"], healing["timed"]
    rule, quantised = "perplexity+", values["quantised"]
    best = {method: middle(method, grid, steps) for method, grid in rates.items()}
    own = of_scores(values, without_keys=COMPARED_IN_08)
    tried = [(rule, n, method, grid) for n in depths for method, grid in rates.items()]
    trained = [Point(), *(Point(rule, n) for n in depths)]
    trained += [
        Point(rule, n, best[method], seed) for n in depths for method in rates for seed in seeds
    ]
    in_turn = [
        recipes.with_steps(best["full"], healing["first_steps"]),
        recipes.with_steps(best["lora"], steps - healing["first_steps"]),
    ]
    others = [
        (n, recipes.with_steps(best["full"], count)) for n, count in healing["equal_steps"]
    ] + [(n, " + ".join(in_turn)) for n in healing["chained_depths"]]
    variants = [Point(rule, n, recipe, seed) for n, recipe in others for seed in seeds]
    kept = [
        (Point(rule, n, best["full"], values["seed"]) if n else Point(), precision)
        for n in quantised["depths"]
        for precision in quantised["precisions"]
    ]
    costs = [(rule, n, method) for _ in range(timed["runs"]) for n in depths for method in rates]
    return [
        replace(bare(own), name="rates", points=trials(tried)(healing)),
        replace(own, name="trained", points=tuple(trained)),
        replace(own, name="costs", kind="cost", points=tuple(costs), settings=timed),
        replace(own, name="variants", points=tuple(variants), tasks={}),
        replace(own, name="quantised", points=tuple(point for point, _ in kept)),
        Table("storage", "other", tuple(kept)),
    ]


def quantised_unhealed(values: Values, n_layers: int) -> list[Table]:
    """What notebook 08 asks a second model: unhealed losses by precision, in the first's shares."""
    of_first = depth.SIZES["smollm2-135m"].n_layers
    quantised, drawn = values["quantised"], scores(values)
    own = bare(of_scores(values, without_keys=COMPARED_IN_08))
    kept = [
        (Point("perplexity+", depth.layers_in(n / of_first, n_layers)) if n else Point(), precision)
        for n in quantised["depths"]
        for precision in quantised["precisions"]
    ]
    return [
        replace(drawn, points=drawn.points[:1]),
        replace(
            own,
            name="quantised",
            points=tuple(point for point, _ in kept),
            texts=values["scored_on"]["texts"],
        ),
        Table("storage", "other", tuple(kept)),
    ]


def seven_metrics(values: Values, n_layers: int) -> list[Table]:
    scored, healing = values["scored_on"], values["healing"]
    depths, seed = values["depths"], values["seed"]
    rates = healing["rates"]
    best = middle("lora", rates, healing["steps"])
    rules = [f"rule {number}" for number in range(N_RULES + values["random_sets"])]
    sets = [(rule, n) for n in depths for rule in rules]
    paper = [f"rule {number}" for number in range(6)]
    drawn = [*paper, *rules[N_RULES:]]
    own = of_scores(values, without_keys=("rates", "rated", "longer"))
    rated = [(rule, n, "lora", rates) for n, rule in healing["rated"]]
    again = [
        Point(rule, depths[0], best, draw)
        for draw in values["seeds"]
        if draw != seed
        for rule in paper
    ]
    longer_steps = healing["longer"]["steps"]
    longer_best = middle("lora", rates, longer_steps)
    longer = [
        Point(rule, depths[0], longer_best, draw) for draw in values["seeds"] for rule in paper
    ]
    return [
        scores(values),
        replace(bare(own), name="rates", points=trials(rated)(healing), is_most=True),
        replace(
            own, name="unhealed", points=(Point(), *(Point(*one) for one in sets)), is_most=True
        ),
        replace(
            own, name="healed", points=tuple(Point(*one, best, seed) for one in sets), is_most=True
        ),
        replace(own, name="seeds", points=tuple(again), tasks={}, limit=None),
        replace(
            own,
            name="answers",
            points=tuple(Point(rule, depths[0], best, seed) for rule in drawn),
            texts={},
            tasks={task: scored["tasks"][task] for task in scored["pooled"]},
            limit=scored["more_questions"],
            is_most=True,
        ),
        replace(healed_longer(own, longer, longer_steps), is_most=True),
    ]


def healed_longer(own: Table, points: Sequence[Point], steps: int) -> Table:
    """The losses of models that are healed again, for another number of steps."""
    return replace(
        own,
        name="longer",
        points=tuple(points),
        tasks={},
        limit=None,
        healing={**own.healing, "steps": steps},
    )


def unhealed_metrics(values: Values, n_layers: int) -> list[Table]:
    """What notebook 09 asks a second model: the loss of each set, in the first share of layers."""
    gone = depth.layers_in(values["depths"][0] / depth.SIZES["smollm2-135m"].n_layers, n_layers)
    rules = [f"rule {number}" for number in range(N_RULES + values["random_sets"])]
    cuts = (Point(), *(Point(rule, gone) for rule in rules))
    texts = values["scored_on"]["texts"]
    judged_on = {first(texts): texts[first(texts)]}
    own = bare(of_scores(values, without_keys=("rates", "rated", "longer")))
    return [
        scores(values),
        replace(own, name="unhealed", points=cuts, is_most=True, texts=judged_on),
    ]


def how_to_heal(values: Values, n_layers: int) -> list[Table]:
    scored, healing, seeds = values["scored_on"], values["healing"], values["seeds"]
    grids, timed, steps = healing["rates"], healing["timed"], healing["steps"]
    like = {"reverse order": ["DoRA"], "taylor": ["QLoRA"]}
    winners = {rule: dict.fromkeys([*grid, *like.get(rule, [])]) for rule, grid in grids.items()}
    at: dict[str, tuple[str, int]] = {rule: (rule, values["depths"][0]) for rule in grids}
    if "unpruned" in grids:
        at["unpruned"] = ("", 0)
    own = of_scores(values, without_keys=("rates", "timed", "one_rate", "longer"))
    longer = healing["longer"]

    def best(rule: str, way: str, steps: int = steps) -> str:
        """The recipe at a rate of its grid, or of that of LoRA."""
        return middle(WAYS[way], grids[rule].get(way, grids[rule]["LoRA"]), steps)

    tried = [
        (*at[rule], WAYS[way], rates) for rule, grid in grids.items() for way, rates in grid.items()
    ]
    chosen = [(rule, way) for rule, ways in winners.items() for way in ways]
    trained = [Point(*at[rule]) for rule in grids]
    trained += [Point(*at[rule], best(rule, way), seed) for rule, way in chosen for seed in seeds]
    claimed = [
        (rule, way) for rule in ("reverse order", "unpruned") for way in ("LoRA", "head + 3")
    ]
    asked = [(rule, way) for rule, way in claimed if way in winners.get(rule, ())]
    answers = [Point(*at["reverse order"]), Point()]
    answers += [Point(*at[rule], best(rule, way), seed) for rule, way in asked for seed in seeds]
    one = healing["one_rate"]
    alike = [
        Point(*at[rule], recipes.recipe_at(WAYS[way], one, steps), seed)
        for rule in ("reverse order", "taylor")
        for way in ("LoRA", "head + 3")
        if one in grids.get(rule, {}).get(way, ())
        for seed in seeds
    ]
    again = [
        Point(*at[rule], best(rule, way, longer["steps"]), seed)
        for rule, ways in longer["ways"].items()
        for way in ways
        for seed in longer["seeds"][rule]
    ]
    costs = [
        (*at["reverse order"], WAYS[way])
        for _ in range(timed["runs"])
        for way in winners["reverse order"]
    ]
    return [
        replace(bare(own), name="rates", points=trials(tried)(healing), is_most=True),
        replace(own, name="trained", points=tuple(trained), is_most=True),
        replace(
            own, name="answers", points=tuple(answers), texts={}, limit=scored["more_questions"]
        ),
        replace(own, name="one-rate", points=tuple(alike), tasks={}, is_most=True),
        replace(healed_longer(own, again, longer["steps"]), limit=own.limit),
        replace(own, name="costs", kind="cost", points=tuple(costs), settings=timed),
    ]


def costs_of_ways(values: Values, n_layers: int) -> list[Table]:
    """What notebook 10 asks a second model: what the ways of C4 cost, in the share of the first."""
    of_first = depth.SIZES["smollm2-135m"].n_layers
    gone = depth.layers_in(values["depths"][0] / of_first, n_layers)
    timed = values["healing"]["timed"]
    points = [
        ("reverse order", gone, WAYS[way])
        for _ in range(timed["runs"])
        for way in ("LoRA", "head + 3", "head + 3, tied")
    ]
    own = of_scores(values, without_keys=("rates", "timed", "one_rate", "longer"))
    return [replace(own, name="costs", kind="cost", points=tuple(points), settings=timed)]


def rounds_or_once(values: Values, n_layers: int) -> list[Table]:
    scored, healing, text = values["scored_on"], values["healing"], values["text"]
    seeds, steps, swapped = values["seeds"], healing["steps"], values["swapped"]
    gone = values["depths"][0]
    ways = [(counts[0], count) for counts in healing["per_round"] for count in counts]
    keys = ("rates", "per_round", "longer", "sources", "source_steps", "source_rates")
    longer = healing["longer"]
    own = replace(of_scores(values, without_keys=keys), source=first(healing["sources"].values()))
    tried = [
        Point(rule, n, recipes.recipe_at(WAYS[way], rate, steps), TRIAL_SEED, per_round=count)
        for rule, grid in healing["rates"].items()
        for way, rates in grid.items()
        for rate in rates
        for n, count in ways
    ]
    chosen = [
        Point(rule, n, middle(WAYS[way], rates, steps), seed, per_round=count)
        for rule, grid in healing["rates"].items()
        for way, rates in grid.items()
        for n, count in ways
        for seed in seeds
    ]
    again = [
        Point(
            rule,
            longer["per_round"][0],
            middle(WAYS[way], healing["rates"][rule][way], longer["steps"]),
            seed,
            per_round=count,
        )
        for seed in longer["seeds"]
        for rule, ways_of in longer["ways"].items()
        for way in ways_of
        for count in longer["per_round"]
    ]
    told = [point for point in chosen if point.seed == seeds[0] and point.cut != "reverse order"]
    sets = swapped["sets"]
    n_swaps = sum(
        (gone if spared is None else len(spared)) * (n_layers - gone) for spared in sets.values()
    )
    around = [Point(), *(Point(rule, gone) for rule in sets)]
    around += [Point(f"swap {number}", gone) for number in range(n_swaps)]
    found = [
        replace(bare(own), name="rates-rounds", points=tuple(tried)),
        replace(own, name="rounds", points=tuple(chosen)),
        Table("rounds-removed", "other", tuple(told)),
        healed_longer(own, again, longer["steps"]),
        Table(
            "longer-removed",
            "other",
            tuple(point for point in again if point.cut != "reverse order"),
        ),
        replace(own, name="unpruned", points=(Point(),), limit=scored["more_questions"]),
        replace(
            own,
            name="swaps",
            points=tuple(around),
            tasks={},
            texts={first(scored["texts"]): swapped["n_windows"]},
            is_most=True,
        ),
        *drawn_sets(values, text["samples"]["n_samples"], gone, replace(own, tasks={})),
    ]
    way, rates = WAYS["head + 3"], healing["source_rates"]
    trained = {**own.healing, "steps": healing["source_steps"]}
    for source in healing["sources"].values():
        of_source = replace(own, healing=trained, source=source)
        recipe = middle(way, rates, healing["source_steps"])
        grid = [("reverse order", gone, way, rates)]
        found += [
            replace(
                bare(of_source), name=f"rates-{source or 'plain'}", points=trials(grid)(trained)
            ),
            replace(
                of_source,
                name=f"text-{source or 'plain'}",
                points=tuple(Point("reverse order", gone, recipe, seed) for seed in seeds),
                limit=scored["more_questions"],
            ),
        ]
    return found


def drawn_sets(
    values: Values, counts: Sequence[int], gone: int, own: Table, *more: Point
) -> list[Table]:
    """Scores from several draws of text, and the models without the sets that they lead to."""
    text = values["text"]
    drawn = tuple(count for count in counts for _ in text["samples"]["seeds"])
    unhealed_sets = tuple(Point(f"draw {number}", gone) for number in range(2 * len(drawn)))
    return [
        Table("samples", "sample", drawn, seq_len=text["seq_len"], dtype=text["dtype"]),
        replace(own, name="drawn", points=(*more, *unhealed_sets), is_most=True),
    ]


def unhealed_draws(values: Values, n_layers: int) -> list[Table]:
    """What notebook 11 asks a second model: sets of the fewest windows and of the most."""
    least, *_, most = values["text"]["samples"]["n_samples"]
    of_first = depth.SIZES["smollm2-135m"].n_layers
    gone = depth.layers_in(values["depths"][0] / of_first, n_layers)
    name = first(values["scored_on"]["texts"])
    texts = {name: values["scored_on"]["texts"][name]}
    own = replace(of_scores(values), tasks={}, texts=texts)
    return drawn_sets(values, (least, most), gone, own, Point())


def recommended_model(values: Values, n_layers: int) -> list[Table]:
    scored, healing = values["scored_on"], values["healing"]
    gone, seeds, steps = values["depths"][0], values["seeds"], healing["steps"]
    grids = healing["rates"]
    own = of_scores(values, without_keys=("rates", "longer"))
    longer = healing["longer"]
    tried = [
        (rule, gone, WAYS[way], rates)
        for rule, grid in grids.items()
        for way, rates in grid.items()
    ]
    paper = [way for way in ("head + 3", "head + 3, tied") if way in grids["reverse order"]]
    named = [("reverse order", way) for way in paper]
    # The best candidate is known afterwards; the first other one stands for it.
    every = [(rule, way) for rule, grid in grids.items() for way in grid]
    named.append(first(key for key in every if key not in named))
    trained = [
        Point(rule, gone, middle(WAYS[way], grids[rule][way], steps), seed)
        for rule, way in named
        for seed in seeds
    ]
    again = [
        Point(rule, gone, middle(WAYS[way], grids[rule][way], longer["steps"]), seed)
        for rule, way in (named[0], named[-1])
        for seed in longer["seeds"]
    ]
    timed = scored["timed"]
    released = [Point(), *(Point("reverse order", gone) for _ in named)]
    peers = [
        replace(own, name="dense", points=(Point(),), texts={}, model=peer)
        for peer in scored["peers"]
    ]
    return [
        replace(bare(own), name="candidates", points=trials(tried)(healing), is_most=True),
        replace(own, name="evaluated", points=(Point(), *trained)),
        *peers,
        healed_longer(own, again, longer["steps"]),
        Table(
            "release",
            "release",
            tuple(released * timed["runs"]),
            seq_len=timed["seq_len"],
            dtype=timed["dtype"],
            settings=timed,
        ),
    ]


def own_model(values: Values, n_layers: int) -> list[Table]:
    scored, healing, goal = values["scored_on"], values["healing"], values["goal"]
    # What another goal needs is known from the weights alone. More layers gone take less.
    gone = selection.count_for_fraction(n_layers, 1 - goal["keep"]) if goal["keep"] else 1
    recipe = ""
    if healing["method"] != orders.NO_HEALING:
        steps = healing["steps"] or whole.MOST_STEPS
        recipe = recipes.recipe_at(healing["method"], healing["learning_rate"], steps)
    text_name = first(scored["texts"])
    own = Table(
        "",
        "study",
        (),
        seq_len=scored["seq_len"],
        healing={"batch_size": whole.BATCH_SIZE, "dropout": 0.0, "warmup_steps": 0},
        source=values["text"]["healing_source"],
        dtype=values["dtype"],
    )
    chosen_on = {"n_samples": whole.N_CHOSEN_ON}
    tried = tuple(Point(rule, gone) for rule in orders.CHEAP_RULES)
    return [
        Table(
            "scan",
            "scan",
            ((text_name, values["dtype"]),),
            seq_len=scored["seq_len"],
            dtype=values["dtype"],
            settings=chosen_on,
        ),
        replace(own, name="candidates", points=tried, texts={text_name: whole.N_CHOSEN_ON}),
        replace(
            own,
            name="measured",
            points=(Point(), Point(goal["rule"], gone, recipe, values["seed"])),
            texts=scored["texts"],
            tasks=scored["tasks"],
            limit=scored["n_questions"],
            is_most=not healing["steps"],
        ),
    ]


NOTEBOOKS: dict[str, Callable[[Values, int], list[Table]]] = {
    "00_quickstart": quickstart,
    "01_layer_similarity": layer_similarity,
    "02_depth_and_question_answering": question_answering,
    "03_depth_and_next_token_loss": next_token_loss,
    "04_simple_against_similarity": simple_rule,
    "05_robustness": robustness,
    "06_block_importance": block_importance,
    "07_depth_against_width": depth_or_width,
    "08_lora_against_continued_pretraining": adapters_or_all,
    "09_seven_metrics": seven_metrics,
    "10_how_to_heal": how_to_heal,
    "11_one_shot_or_iterative": rounds_or_once,
    "12_the_recommended_model": recommended_model,
    "13_your_own_model": own_model,
}
# What these ask a model for that is not the first they look at; all others ask for the same.
OF_SECOND = {
    "04_simple_against_similarity": both_rules,
    "05_robustness": orders_of_shots,
    "06_block_importance": unhealed_importance,
    "07_depth_against_width": times_of_shapes,
    "08_lora_against_continued_pretraining": quantised_unhealed,
    "09_seven_metrics": unhealed_metrics,
    "10_how_to_heal": costs_of_ways,
    "11_one_shot_or_iterative": unhealed_draws,
}


# --- what notebooks share -------------------------------------------------------------------------


def of_block(values: Values, **measured: Any) -> Table:
    """A study of models that lack their closest block, among others (02 to 05)."""
    text = values["text"]
    healing = without(values.get("healing", {}), "own_rates", "other_ranks", "rates")
    return Table(
        "",
        "study",
        (),
        seq_len=text["seq_len"],
        n_calibration=text["n_samples"],
        healing=healing,
        source=text.get("healing_source"),
        dtype=values["dtype"],
        **measured,
    )


def of_scores(values: Values, *, without_keys: Sequence[str] = ("rates",)) -> Table:
    """A study of models whose layers scores have chosen (06 to 12)."""
    scored = values["scored_on"]
    return Table(
        "",
        "study",
        (),
        texts=scored["texts"],
        tasks=scored["tasks"],
        limit=scored["n_questions"],
        seq_len=scored["seq_len"],
        healing=without(values["healing"], *without_keys),
        source=values["text"].get("healing_source"),
        dtype=values["dtype"],
    )


def scores(values: Values) -> Table:
    """Scores of all layers on each draw of text."""
    text = values["text"]
    counts = tuple(count for _, count, _ in text["draws"])
    return Table("scores", "score", counts, seq_len=text["seq_len"], dtype=text["dtype"])


def bare(table: Table) -> Table:
    """A study whose points are watched in training, and measured in nothing else."""
    return replace(table, texts={}, tasks={}, limit=None)


def unhealed(depths: Iterable[int], rules: Sequence[str]) -> tuple[Point, ...]:
    """The points of :func:`depth.depth_points` without training."""
    return tuple(
        Point(rule, n) if n else Point() for n in depths for rule in (rules if n else [""])
    )


def healed(
    healing: Values, depths: Iterable[int], rules: Sequence[str], seeds: Sequence[int]
) -> tuple[Point, ...]:
    """The points of :func:`depth.depth_points` with training."""
    recipe = plain_recipe(healing)
    return tuple(Point(rule, n, recipe, seed) for n in depths for rule in rules for seed in seeds)


def trials(tried: Iterable[tuple]) -> Callable[[Values], tuple[Point, ...]]:
    """By the settings of healing, a point for each rate of (cut, layers, recipe, rates)."""
    listed = list(tried)

    def points(healing: Values) -> tuple[Point, ...]:
        """Each rate for as many steps as the settings say."""
        return tuple(
            Point(cut, n, recipes.recipe_at(recipe, rate, healing["steps"]), TRIAL_SEED)
            for cut, n, recipe, rates in listed
            for rate in rates
        )

    return points


def plain_recipe(healing: Values) -> str:
    """The recipe that the settings of healing say."""
    return recipes.recipe_at(healing["method"], healing["learning_rate"], healing["steps"])


def middle(recipe: str, rates: Sequence[float], steps: int) -> str:
    """A recipe at a rate in the middle of its grid, in the place of the best one."""
    return recipes.recipe_at(recipe, sorted(rates)[math.ceil(len(rates) / 2) - 1], steps)


def without(values: Values, *names: str) -> dict[str, Any]:
    """Settings without some of them."""
    return {name: value for name, value in values.items() if name not in names}


def first(values: Iterable) -> Any:
    """The first of some values."""
    return next(iter(values))
