"""Does attribution name what was broken? Two models are trained as `demo` is, one on traces with false facts, one on
traces with wrong steps; both answer the same questions, and `memreason faults` must tell which is which.

    python benchmarks/lesions.py [--share 0.8] [--questions 300] [--traces 900]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from memreason import faults, load_recipe, make_atlas, train, write_traces
from memreason.core.files import write_json
from memreason.data.atlas_changes import LESIONS, lesioned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.8, help="of the traces that are lesioned")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--traces", type=int, default=900)
    parser.add_argument("--only", choices=LESIONS, action="append")
    arguments = parser.parse_args()
    found = {}
    for lesion in arguments.only or LESIONS:
        folder = Path("runs") / f"lesion-{lesion}"
        folder.mkdir(parents=True, exist_ok=True)
        traces = lesioned(make_atlas("train", arguments.traces), lesion, arguments.share)
        data = folder.with_suffix(".jsonl")
        write_traces(data, traces)
        recipe = load_recipe(
            "demo",
            {
                "name": folder.name,
                "data.paths": [str(data)],
                "data.n_train": len(traces),
                "data.validation": 0,
                "eval.n": arguments.questions,
                "eval.batch_size": 64,
            },
        )
        table = faults(train(recipe), settings=recipe.eval)
        found[lesion] = table["counts"]
        wrong = {name: table["counts"][name] for name in ("memory", "reason", "both", "format")}
        print(f"{lesion}: {table['wrong']} of {table['n']} wrong: {wrong}")
    write_json(Path("runs/lesions.json"), found)


if __name__ == "__main__":
    main()
