"""GlobalOpinionQA by country: your copy of its CSV as pairs for `train`. (It is CC BY-NC-SA 4.0, and not part of this.)

    python examples/global_opinions.py data/global_opinions.csv pairs.jsonl --countries Nigeria Egypt India China Japan
    python -m grpo_kernels train --data pairs.jsonl --split-by question --model DIR --compare

The CSV is Anthropic/llm_global_opinions on the Hugging Face hub: columns question, selections (each country's shares of
the answers) and options. A pair says that the answer with a country's largest share is preferred to another one, drawn
with the seed; questions whose two largest shares are equal are left out, and so are answers that are no opinion.
"""

import argparse
import ast
import csv
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

NO_OPINION = ("don't know", "refused", "no answer", "dk/refused", "missing", "other")


def pairs_of(row: dict[str, str], countries: list[str], rng: random.Random) -> Iterator[dict[str, str]]:
    """Of one question, a pair for each country that was asked."""
    selections, options = row["selections"], ast.literal_eval(row["options"])
    shares_of = ast.literal_eval(selections[selections.index("{") : selections.rindex("}") + 1])
    for country, shares in shares_of.items():
        answers = [
            (share, str(option))
            for share, option in zip(shares, options, strict=False)
            if not any(word in str(option).lower() for word in NO_OPINION)
        ]
        answers.sort(reverse=True)
        if (countries and country not in countries) or len(answers) < 2 or answers[0][0] == answers[1][0]:
            continue
        question = row["question"].strip()
        texts = {"chosen": f" {answers[0][1]}", "rejected": f" {rng.choice(answers[1:])[1]}"}
        yield {"prompt": f"Question: {question}\nAnswer:", **texts, "group": country, "question": question}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("jsonl", type=Path)
    parser.add_argument("--countries", nargs="*", default=[], help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with options.csv.open(newline="", encoding="utf-8") as file:
        pairs = [pair for row in csv.DictReader(file) for pair in pairs_of(row, options.countries, rng)]
    options.jsonl.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    for country, count in Counter(pair["group"] for pair in pairs).most_common():
        print(f"{country}: {count} pairs")


if __name__ == "__main__":
    main()
