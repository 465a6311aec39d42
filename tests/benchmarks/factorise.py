"""A sweep of ranks over a model by two workers of one thread beside one, in turns.

    python tests/benchmarks/factorise.py [--model build/smollm2] [--runs 3]

The model is calibrated once. Each run then factorises every linear but those of the first block,
which warm the workers, and writes and judges all ranks given, with no finished pieces. Both must
leave the same bytes.
"""

from pathlib import Path

from common import add_text_options, arguments_parser, check_inputs, scratch, write_recipe
from measuring import compare, measured_anew

KINDS = ("pieces", "errors")


def main() -> None:
    parser = arguments_parser(__doc__)
    add_text_options(parser)
    parser.add_argument("--method", default="svd_llm")
    parser.add_argument("--ranks", type=float, nargs="+", default=[s / 20 for s in range(2, 20)])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    check_inputs(arguments)
    with scratch("factorise") as name:

        def run(workers: int) -> tuple[float, str]:
            recipe = write_recipe(
                Path(name) / "recipe.yaml",
                arguments,
                [{"method": arguments.method, "rank": arguments.ranks}],
                {"sequences": 8, "length": 256, "gradient_sequences": 0},
                compute={"workers": workers, "cpus_per_worker": 1, "dtype": "float32"},
                budget={"bits_per_weight": 12.0},
            )
            return measured_anew(
                recipe, KINDS, lambda unit: unit.block == 0, lambda unit: unit.block > 0
            )

        text = f"{arguments.model.name}: {arguments.method}, {len(arguments.ranks)} ranks"
        compare("Two workers factorise", text, run, arguments)


if __name__ == "__main__":
    main()
