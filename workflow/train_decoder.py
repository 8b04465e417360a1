"""Train a generator of scenes and write its weights, for `config/generator.yaml`.

    python workflow/train_decoder.py planted.safetensors --planted [--scenes 8000] [--steps 700] [--size 48] [--seed 0]

One with `--planted` keeps the kinds of objects apart in its first three layers; without it, every layer is free. About
four CPU minutes each.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline.config.networks import NetworkSpec

MODULE = Path(__file__).parents[1] / "config" / "networks" / "scene_decoder.py"


def main() -> None:
    from pipeline.networks.build import build
    from pipeline.networks.checkpoint import write_safetensors
    from pipeline.networks.training.decoder import examples, fit

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--planted", action="store_true", help="keep the kinds of objects apart")
    for name, value in (("scenes", 8000), ("steps", 700), ("size", 48), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args()
    spec = NetworkSpec(module=f"{MODULE}:decoder", arguments={"planted": asked.planted}, seed=asked.seed)
    network = build(spec)

    def progress(step: int, loss: float) -> None:
        if step % 50 == 0:
            print(f"step {step} of {asked.steps}: mean absolute difference {loss:.4f}", file=sys.stderr)

    given = examples(asked.scenes, asked.size, asked.seed)
    error = fit(network, given, asked.steps, seed=asked.seed, progress=progress)
    asked.weights.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(asked.weights, network.state_dict())
    print(f"{asked.weights}: mean absolute difference {error:.4f}", file=sys.stderr)


if __name__ == "__main__":
    main()
