"""Merging the experts of a 12-layer model by two workers of one thread beside one, in turns.

    python tests/benchmarks/clustering.py [--runs 3]

A random model (12 layers of 64 experts, hidden 256, width 192) is calibrated once. Each run then
clusters and merges every layer by every method given and rounds it to 4 bits, from that
calibration, with warm workers and no finished reductions. Both must leave the same bytes.
"""

from pathlib import Path

from common import add_text_options, arguments_parser, check_inputs, scratch, write_recipe
from measuring import compare, measured_anew
from random_moe import make_random_moe

KINDS = ("reductions", "pieces", "errors")
FOUR = {"method": "rtn", "bits": 4, "group_size": -1}
LAYERS, EXPERTS, HIDDEN, WIDTH = 12, 64, 256, 192


def main() -> None:
    parser = arguments_parser(__doc__)
    add_text_options(parser)
    parser.add_argument("--methods", nargs="+", default=["hc_smoe", "sub_moe", "merge_moe"])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    with scratch("clustering") as name:
        folder = Path(name)
        arguments.model = folder / "model"
        each = EXPERTS * 3 * HIDDEN * WIDTH * 2
        make_random_moe(arguments.model, LAYERS * each * 1.03 / 1e9, HIDDEN, EXPERTS, WIDTH)
        check_inputs(arguments)

        def run(workers: int) -> tuple[float, str]:
            recipe = write_recipe(
                folder / "runs" / "recipe.yaml",
                arguments,
                [FOUR, *([{"method": name, "keep": 0.5}, FOUR] for name in arguments.methods)],
                {"sequences": 16, "length": 128, "expert_tokens": 2048},
                compute={"workers": workers, "cpus_per_worker": 1},
                budget={"bits_per_weight": 8.0},
            )
            return measured_anew(
                recipe, KINDS, lambda unit: unit.kind == "linear", lambda unit: unit.kind == "bank"
            )

        text = (
            f"Random model, about {LAYERS} layers of {EXPERTS} experts, hidden {HIDDEN}, width"
            f" {WIDTH}; {', '.join(arguments.methods)}"
        )
        compare("Two workers merge", text, run, arguments)


if __name__ == "__main__":
    main()
