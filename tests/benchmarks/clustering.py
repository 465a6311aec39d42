"""Merging the experts of a 12-layer model by two workers of one thread beside one, in turns.

    python tests/benchmarks/clustering.py [--runs 3]

A random model (14 layers of 64 experts, hidden 256, width 192) is calibrated once. Each run then
clusters and merges the experts of 12 layers by every method given and rounds them to 4 bits, from
that calibration, without finished reductions. The other two layers come first and are not timed, so
that every worker has loaded what it needs. Both must leave the same bytes.
"""

from pathlib import Path

from common import add_text_options, arguments_parser, check_inputs, scratch, write_recipe
from measuring import compare, measured_anew
from random_moe import make_random_moe

KINDS = ("reductions", "pieces", "errors")
FOUR = {"method": "rtn", "bits": 4, "group_size": -1}
WARM, LAYERS, EXPERTS, HIDDEN, WIDTH = 2, 12, 64, 256, 192


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
        size = (WARM + LAYERS) * each * 1.03 / 1e9
        make_random_moe(arguments.model, size, HIDDEN, EXPERTS, WIDTH)
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
                recipe,
                KINDS,
                lambda unit: unit.kind == "bank" and unit.block < WARM,
                lambda unit: unit.kind == "bank" and unit.block >= WARM,
            )

        text = (
            f"Random model, {LAYERS} layers, after {WARM} that are not timed, of {EXPERTS} experts,"
            f" hidden {HIDDEN}, width {WIDTH}; {', '.join(arguments.methods)}"
        )
        compare("Two workers merge", text, run, arguments)


if __name__ == "__main__":
    main()
