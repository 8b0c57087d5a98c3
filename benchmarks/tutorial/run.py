"""The tutorial on its own data: a dense MobileNetV1 is trained on Imagenette, then pruned by each recipe.

    make tutorial DATA=imagenette  # with train/CLASS/*.jpg and val/CLASS/*.jpg; hours, goes on where it stopped

Magnitude and M-FAC by the tutorial's two recipes in their original spelling, and M-FAC by recipes/mfac.md, from one
dense model, on the same images and steps. Models stay in build/tutorial; table, picture and measurements go to
results/.
"""

import argparse
import shutil
from pathlib import Path

from mfac.tutorial.compare import compare
from mfac.tutorial.settings import RunSettings, TrainSettings
from mfac.tutorial.train import train

ROOT = Path(__file__).resolve().parents[2]
RECIPES = [
    ROOT / "tests" / "recipes" / "original_magnitude.md",
    ROOT / "tests" / "recipes" / "original_mfac.md",
    ROOT / "recipes" / "mfac.md",
]


def main() -> None:
    """Train, prune and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of Imagenette")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--dense", help="a dense model.pt, in place of training one")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "tutorial", help="where models go")
    arguments = parser.parse_args()
    common = {
        "dataset": "imagenette",
        "dataset_path": arguments.data,
        "image_size": arguments.image_size,
        "loader_num_workers": arguments.workers,
        "save_dir": str(arguments.output),
    }
    dense = Path(arguments.dense or arguments.output / "dense" / "model.pt")
    if arguments.dense is None:
        recipe = str(ROOT / "recipes" / "dense.md")
        if not (dense.with_name("done")).exists():
            train(TrainSettings(recipe_path=recipe, model_tag="dense", pretrained="False", resume=True, **common))
            dense.with_name("done").touch()
    compare([str(path) for path in RECIPES], RunSettings(pretrained=str(dense), **common), arguments.seeds)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    for path in arguments.output.glob("comparison.*"):
        shutil.copy(path, results / path.name)


if __name__ == "__main__":
    main()
