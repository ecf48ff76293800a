"""How the pairs were made that `train` learns from without --data: groups that want different things.

    python examples/made_up_pairs.py FOLDER     writes made-up-colours.train.jsonl.gz and .test.jsonl.gz

Questions about the colour of things. An answer has three traits: friendly or formal, long or short, right or wrong.
The two answers of a pair differ in one trait. All groups prefer right; on the rest they pull apart:

    casual    70 %   friendly, long
    business  22 %   formal,   long
    editors    8 %   formal,   short

Nothing in the prompt tells the groups apart, so one policy has to serve all. Fitting the pooled pairs follows the
majority: the editors lose on both tone and length. The policy with the lowest worst-group loss is undecided where
casual and editors disagree, which costs every group log 2 on such pairs. This follows from the losses alone.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path

NAME, SPLITS = "made-up-colours", {"train": (2000, 42), "test": (600, 10_042)}  # numbers of pairs, and seeds
SHARES = {"casual": 0.70, "business": 0.22, "editors": 0.08}
PREFERS = {
    "casual": {"tone": "friendly", "length": "long"},
    "business": {"tone": "formal", "length": "long"},
    "editors": {"tone": "formal", "length": "short"},
}
COLOURS = {
    "red": ("tomato", "ruby", "fire engine", "poppy"),
    "blue": ("sapphire", "clear sky", "blue whale", "cornflower"),
    "green": ("emerald", "fern", "frog", "cactus"),
    "yellow": ("lemon", "canary", "banana", "sunflower"),
    "white": ("snowflake", "swan", "chalk cliff", "polar bear"),
    "black": ("raven", "lump of coal", "panther", "night sky"),
}
THINGS = [(thing, colour) for colour, things in COLOURS.items() for thing in things]
QUESTIONS = ("What colour is a {}?", "Tell me the colour of a {}.", "Which colour does a {} have?")
VALUES = {"tone": ("friendly", "formal"), "length": ("long", "short"), "truth": ("right", "wrong")}


def generate_pairs(num_pairs: int, seed: int) -> list[dict[str, str]]:
    """``num_pairs`` pairs with groups in the shares of ``SHARES``, the same for the same seed.

    Example:
        >>> {pair["group"] for pair in generate_pairs(200, seed=0)} == set(SHARES)
        True
    """
    rng = random.Random(seed)
    pairs = []
    for group, share in SHARES.items():
        pairs += [_pair(group, rng) for _ in range(round(num_pairs * share))]
    rng.shuffle(pairs)
    return pairs


def write(folder: Path) -> None:
    """One file for each split; the same bytes every time."""
    for split, (num_pairs, seed) in SPLITS.items():
        lines = "".join(json.dumps(pair) + "\n" for pair in generate_pairs(num_pairs, seed))
        (folder / f"{NAME}.{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))


def _pair(group: str, rng: random.Random) -> dict[str, str]:
    thing, colour = rng.choice(THINGS)
    differing = rng.choice(list(VALUES))
    traits = {trait: rng.choice(VALUES[trait]) for trait in VALUES}
    better = {**PREFERS[group], "truth": "right"}[differing]
    worse = next(value for value in VALUES[differing] if value != better)
    wrong = rng.choice([other for other in COLOURS if other != colour])
    chosen, rejected = (_answer(thing, colour, wrong, {**traits, differing: value}) for value in (better, worse))
    prompt = f"User: {rng.choice(QUESTIONS).format(thing)}\nAssistant:"
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "group": group}


def _answer(thing: str, colour: str, wrong: str, traits: dict[str, str]) -> str:
    said = colour if traits["truth"] == "right" else wrong
    if traits["tone"] == "friendly":
        text = f" Oh, that's easy! It's {said}."
        more = f" Ask me about a {thing} any time!"
    else:
        text = f" The colour is {said}."
        more = f" This is the usual colour of a {thing}."
    return text + more if traits["length"] == "long" else text


if __name__ == "__main__":
    write(Path(sys.argv[1]))
