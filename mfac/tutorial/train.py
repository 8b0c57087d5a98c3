"""The program behind `mfac train`: train and prune as a recipe says, with checkpoints and the tutorial's results."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from mfac.checks import check_int, check_number, warn
from mfac.distributed.replicas import Replicas
from mfac.files.states import read_state
from mfac.pruning.result import write_csv
from mfac.recipe.manager import Manager, Session
from mfac.tutorial.files import make_folder, save, save_text
from mfac.tutorial.loop import Measurement, evaluate, fit
from mfac.tutorial.processes import distribute, find_device, one_first, team
from mfac.tutorial.settings import NETWORK, TrainSettings
from mfac.tutorial.start import prepare

_FILES = ("model.pt", "model.txt", "checkpoint.pt")  # of a run
# What a resumed run must have in common with the interrupted one, beside network and images: what decides the batches
# (processes that read images draw their random crops from seeds of their own) and the steps.
_SAME = ("train_batch_size", "max_train_steps", "seed", "amp", "loader_num_workers")
_MAX_TAG = 200  # bytes; file systems allow 255 for a name, and the log's ends in .csv


def _model_tag(settings: TrainSettings) -> str:
    """Return the name of the run's folder, which must lie in `save_dir` itself."""
    tag = Path(settings.recipe_path).stem if settings.model_tag is None else settings.model_tag
    if (
        not isinstance(tag, str)
        or tag in ("", ".", "..")
        or tag != tag.strip()
        or not tag.isprintable()
        or any(separator in tag for separator in "/\\")
        or len(tag.encode()) > _MAX_TAG
    ):
        raise ValueError(
            f"model_tag: expected a plain folder name of at most {_MAX_TAG} bytes, without / and \\, got {tag!r:.120}"
        )
    return tag


def run_folder(settings: TrainSettings) -> Path:
    """Return the folder of a run, `<save_dir>/<model_tag>`.

    Args:
        settings: The options.

    Returns:
        The folder, which may not be there.
    """
    return Path(settings.save_dir) / _model_tag(settings)


def _folder(settings: TrainSettings) -> Path:
    """Return the run's folder; that of an earlier run only if this one goes on with it or replaces it."""
    folder = run_folder(settings)
    resumed = settings.checkpoint_path and Path(settings.checkpoint_path).resolve().parent
    if settings.resume or settings.overwrite or folder.resolve() == resumed:
        return folder
    if holds_run(folder):
        raise ValueError(
            f"model_tag: expected the name of a new run, got {folder.name!r}: {folder} holds an earlier one; "
            "--resume goes on with it, --overwrite replaces it"
        )
    return folder


def holds_run(folder: Path) -> bool:
    """Return whether a folder holds a run, finished or not, that would be lost.

    Args:
        folder: The folder.

    Returns:
        Whether there are files of a run that has trained for an epoch.
    """
    earlier = [name for name in _FILES if (folder / name).exists()]
    return bool(earlier) and not (earlier == ["checkpoint.pt"] and epochs_done(folder) == 0)


def epochs_done(folder: Path) -> int | None:
    """Return for how many epochs the run of a folder has trained.

    Args:
        folder: The folder.

    Returns:
        The number; None if there is no checkpoint that can be read.
    """
    try:
        return _load_checkpoint(str(folder / "checkpoint.pt"), torch.device("cpu"))["epoch"] + 1
    except ValueError:
        return None


def _checkpoint(
    settings: TrainSettings, folder: Path, device: torch.device, recipe: str, replicas: Replicas
) -> dict[str, Any] | None:
    """Return the checkpoint that the run goes on from; None if it begins anew."""
    if settings.checkpoint_path:
        return _load_checkpoint(settings.checkpoint_path, device)
    path = folder / "checkpoint.pt"
    if not settings.resume:
        return None
    if not path.is_file():
        if (folder / "model.pt").exists():
            raise ValueError(
                f"resume: expected {path}, got a run without it, as of --one-shot; --overwrite replaces it"
            )
        tqdm.write(f"{path} does not exist: the run begins anew")
        return None
    state = _load_checkpoint(str(path), device)
    for name, saved in state.get("settings", {}).items():
        if name in _SAME and getattr(settings, name) != saved:
            raise ValueError(
                f"resume: expected --{name.replace('_', '-')} {saved} as before, got {getattr(settings, name)}; "
                "--checkpoint-path goes on with other options"
            )
    processes = state.get("processes", replicas.size)
    if processes != replicas.size:
        tqdm.write(
            f"the run was begun by {processes} processes: {replicas.size} go on with other batches, and end with other "
            "weights"
        )
    if state.get("recipe_text", recipe) != recipe:
        raise ValueError(
            "resume: expected the recipe and the --recipe-args of before, got others; --checkpoint-path goes on with "
            "another recipe, but for what the first has set already"
        )
    return state


def _write_model_text(path: Path, epoch: int, measured: Measurement, session: Session) -> None:
    lines = [f"epoch: {epoch}", f"__loss__: {measured.loss}", f"top1acc: {measured.top1}", f"top5acc: {measured.top5}"]
    lines += [f"sparsity: {session.sparsity:.6f}", *_sparsity_text(session)]
    save_text("\n".join(lines) + "\n", path)


def _sparsity_text(session: Session) -> list[str]:
    return [f"not finished: {pruner!r}" for pruner in session.pruners if not pruner.finished] + [
        f"sparsity of {name}: {reached:.6f}" + ("" if asked is None else f", asked {asked:.6f}")
        for name, (asked, reached) in session.layer_sparsities().items()
    ]


def _load_checkpoint(path: str, device: torch.device) -> dict[str, Any]:
    state = read_state("checkpoint_path", path, "a checkpoint", device)
    if not isinstance(state, dict) or not {"model", "optimizer", "recipe", "epoch"} <= set(state):
        raise ValueError(
            f"checkpoint_path: expected a checkpoint of `mfac train`, got {path}; for weights use --pretrained {path}"
        )
    return state


def check_options(settings: TrainSettings) -> None:
    """Check the options that are numbers, and those that exclude each other.

    Args:
        settings: The options.

    Raises:
        TypeError: If an option that is a number is not one.
        ValueError: If it is out of range, or options do not go together.
    """
    if settings.max_train_steps != -1:
        check_int("max_train_steps", settings.max_train_steps, also=", or -1 for all steps")
    check_int("seed", settings.seed, 0, 2**63 - 1)
    check_number("init_lr", settings.init_lr, 0)
    for name in ("overwrite", "checkpoint_path", "one_shot"):
        if settings.resume and getattr(settings, name):
            raise ValueError(f"resume: expected it without --{name.replace('_', '-')}, got both")


def train(settings: TrainSettings, resume_hint: str = "with --resume") -> list[Measurement]:
    """Train and prune a model as a recipe says.

    Writes into `<save_dir>/<model_tag>/`: `model.pt` and `model.txt`, the best epoch from `save_best_after` on, and
    `checkpoint.pt`, the last epoch. A run that was interrupted or killed goes on from it with `resume` and, on the CPU,
    ends with the same weights as an undisturbed one, bit for bit: each epoch is seeded by its number. If no epoch
    qualifies as the best (training ends before `save_best_after`, or was resumed in another folder and does not
    improve), `model.pt` is the last epoch. With `resume` a run that is finished returns at once. The optimizer is Adam:
    in the single epoch that such a recipe leaves for recovery, at a learning rate near 4e-4, SGD would hardly change
    the weights.

    Args:
        settings: The options.
        resume_hint: How the command goes on after an interruption, for the text that says so.

    Returns:
        The measurements, one per epoch and one after every pruning step; of a run that goes on, also those before.

    Raises:
        TypeError: If an option that is a number is not one.
        ValueError: If an option, the recipe or the data are not as expected.
        ImportError: If the digits are requested and scikit-learn is not installed.
        RuntimeError: If the loss is not finite, or (a BuildError) if required kernels cannot be built.
        KeyboardInterrupt: After it has said how to go on.
    """
    check_options(settings)
    replicas = team()
    manager = Manager.from_recipe(settings.recipe_path, settings.recipe_args)
    if not settings.one_shot:
        manager.check_epochs()
    folder = _folder(settings)
    recipe = str(manager.recipe)
    state = _checkpoint(settings, folder, find_device(settings.device), recipe, replicas)
    source = settings.checkpoint_path or str(folder / "checkpoint.pt")
    epochs = replicas.together(lambda: (-1 if state is None else state["epoch"] + 1,), 1)
    if len(set(epochs)) > 1:
        raise ValueError(f"save_dir: expected a folder that all {replicas.size} processes share, got {folder}")
    earlier = [Measurement(**measured) for measured in state.get("measurements", ())] if state else []
    if state and not settings.one_shot and state["epoch"] + 1 >= manager.epochs:
        completed = f"{source}, which has completed the recipe's {manager.epochs:g} epochs"
        if not settings.resume:
            raise ValueError(f"checkpoint_path: expected training left to do, got {completed}")
        tqdm.write(f"nothing is left to do for {completed}")  # jobs that are started again resume whatever there is
        if settings.logs_dir and earlier and replicas.rank == 0:
            _write_logs(make_folder("logs_dir", settings.logs_dir), folder.name, earlier)
        return earlier
    fixed = (*NETWORK, "image_size", "dataset") if settings.resume else NETWORK
    with one_first(replicas):
        settings, data, built = prepare(settings, state, source, fixed, replicas)
    model, images = built.model, data.num_images
    if state is not None and settings.resume and state.get("images", images) != images:
        raise ValueError(
            f"resume: expected the {state['images'][0]:,} training and {state['images'][1]:,} validation images of "
            f"before, got {images[0]:,} and {images[1]:,}; --checkpoint-path goes on with others"
        )
    if replicas.rank == 0:
        size = "" if settings.image_size is None else f", {settings.image_size} x {settings.image_size}"
        tqdm.write(
            f"{settings.arch_key} on {settings.dataset}: {images[0]:,} training and {images[1]:,} validation images of "
            f"{data.num_classes} classes{size}; {find_device(settings.device)}, seed {settings.seed}"
        )
    if state is None and settings.initial_weights == "False" and manager.prunes:
        warn("pretrained: the recipe prunes random weights; --pretrained FILE (or True) gives trained ones")
    network = {**asdict(built.spec), "dataset": settings.dataset}
    writes, logs = replicas.rank == 0, None
    if writes:
        logs = make_folder("logs_dir", settings.logs_dir) if settings.logs_dir else None
        make_folder("save_dir", folder)
    for line in manager.describe(settings.one_shot):
        tqdm.write(line)
    if settings.one_shot:
        group = replicas.group
        session = manager.one_shot(model, data.gradients, F.cross_entropy, progress=True, process_group=group)
        accuracy = evaluate(model, data.validation, replicas)
        measured = Measurement(0, 0.0, True, math.nan, *accuracy, session.sparsity, 0.0)
        if not writes:
            return [measured]
        if state is None or settings.overwrite:
            _remove_files(folder)
        save({"model": model.state_dict(), "recipe": session.state_dict(), "network": network}, folder / "model.pt")
        _write_model_text(folder / "model.txt", 0, measured, session)
        tqdm.write(f"pruned to {100 * session.sparsity:.2f} %: top-1 {measured.top1:.1f} %; saved in {folder}")
        if logs:
            _write_logs(logs, folder.name, [measured])
        return [measured]

    torch.manual_seed(settings.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.init_lr)
    trained = distribute(model, replicas)
    session = manager.apply(
        model, optimizer, data.gradients, F.cross_entropy, progress=True, process_group=replicas.group
    )
    first_epoch, best, measurements = 0, None, []
    if state:
        optimizer.load_state_dict(state["optimizer"])
        session.load_state_dict(state["recipe"])
        first_epoch, best = state["epoch"] + 1, state["best"]
        tqdm.write(f"going on with epoch {first_epoch}, at a sparsity of {100 * session.sparsity:.2f} %")
    after = math.ceil(manager.pruned_from) if settings.save_best_after is None else settings.save_best_after
    final_epoch = math.ceil(manager.epochs) - 1

    def keep(epoch: int, measured: Measurement | None) -> None:
        nonlocal best, kept
        is_best = measured is not None and epoch >= after and (best is None or measured.top1 > best)
        best = measured.top1 if is_best else best
        if not writes:
            return
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "recipe": session.state_dict(),
            "epoch": epoch,
            "best": best,
            "network": network,
            "recipe_text": recipe,
            "measurements": [asdict(measured) for measured in (*earlier, *measurements)],
            "settings": {name: getattr(settings, name) for name in _SAME},
            "processes": replicas.size,
            "images": images,
        }
        if is_best or (epoch == final_epoch and (best is None or not (folder / "model.txt").exists())):
            save(state, folder / "model.pt")
            _write_model_text(folder / "model.txt", epoch, measured, session)
        save(state, folder / "checkpoint.pt")  # last: a run that is killed before repeats the epoch, with the same bits
        kept = epoch
        if logs and measured is not None:
            _write_logs(logs, folder.name, [*earlier, *measurements])

    kept = first_epoch - 1
    if writes and (state is None or settings.overwrite):
        _remove_files(folder)
    if state is None:
        keep(-1, None)  # what a run that is killed in its first epoch goes on from
    try:
        fit(
            trained,
            optimizer,
            session,
            data,
            manager.epochs,
            first_epoch=first_epoch,
            max_train_steps=settings.max_train_steps,
            amp=settings.amp,
            on_epoch=keep,
            measurements=measurements,
            seconds=earlier[-1].seconds if earlier else 0.0,
        )
    except KeyboardInterrupt:
        tqdm.write(
            f"interrupted; {folder / 'checkpoint.pt'} holds the model after {kept + 1} epochs: "
            f"the same command {resume_hint} goes on from there"
        )
        raise
    for line in _sparsity_text(session):
        tqdm.write(line)
    tqdm.write(f"saved in {folder}")
    return [*earlier, *measurements]


def _remove_files(folder: Path) -> None:
    """Remove the files of an earlier run; called right before the first of a new one is written."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)


def _write_logs(folder: Path, name: str, measurements: list[Measurement]) -> None:
    """Write a CSV file of all measurements and, if it is installed, those of the last epoch for TensorBoard."""
    write_csv(folder / f"{name}.csv", Measurement, measurements)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return
    last = math.ceil(measurements[-1].epoch)
    with SummaryWriter(str(folder / name)) as writer:
        for measured in (m for m in measurements if math.ceil(m.epoch) == last):
            for field in ("train_loss", "loss", "top1", "top5", "sparsity", "learning_rate"):
                writer.add_scalar(field, getattr(measured, field), measured.step)
