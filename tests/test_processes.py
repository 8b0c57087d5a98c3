"""`mfac train` in several processes: under torchrun itself and, which is quicker, in forked processes like its own."""

import multiprocessing
import os
import re
import shutil
import signal
import sys
import time

import pytest
import torch
from ranks import TORCHRUN, run_script
from torch.distributed import TCPStore

from mfac.cli.main import main
from mfac.tutorial.data import Batches, load_data
from mfac.tutorial.loop import evaluate
from mfac.tutorial.models import MobileNetV1

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = """
modifiers:
  - !EpochRangeModifier {end_epoch: 2}
  - !TrainableParamsModifier {params: ["re:sections.0.*"], trainable: False, start_epoch: 0.5, end_epoch: 1}
  - !MFACPruningModifier
    params: ["re:sections.4.*point.conv.weight"]
    init_sparsity: 0.25
    final_sparsity: 0.9
    start_epoch: 0.5
    end_epoch: 1.5
    update_frequency: 1
    num_grads: 3
    recomputations: 2
    corrections: 1
    correction_batches: 3
"""


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "r.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mfac.tutorial.train.fit", interrupt)
        assert main(command(folder, "one")) == 130  # what is imported for it, the forked processes have already
    return folder


def command(folder, tag, *more):
    options = "--width 0.1 --pretrained False --train-batch-size 8 --max-train-steps 2 --device cpu"
    return ["train", "--recipe-path", str(folder / "r.yaml"), "--save-dir", str(folder), *options.split(),
            "--model-tag", tag, *more]  # fmt: skip


def _child(rank, port, folder, arguments, sabotage):
    os.environ |= {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", buffering=1) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sabotage is not None:
        sabotage(rank)
    status = main(arguments)
    sys.stdout.flush()
    os._exit(status)


def start(folder, *arguments, sabotage=None):
    # As torchrun's own, it outlives the processes.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_child, args=(rank, store.port, folder, list(arguments), sabotage)) for rank in range(2)
    ]
    for child in children:
        child.start()
    return children, store


def finish(folder, children, store):
    """Return the statuses, and what both processes write to stdout and stderr."""
    for child in children:
        child.join(120)
    texts = ["".join((folder / f"{rank}.{name}").read_text() for rank in range(2)) for name in ("out", "err")]
    return [child.exitcode for child in children], *texts


def run(folder, *arguments, sabotage=None):
    return finish(folder, *start(folder, *arguments, sabotage=sabotage))


def fail_in_epoch_1(rank):
    """Let the second process find a bad image in its second batch of the second epoch."""
    batches, epochs = Batches.__iter__, iter(range(100))

    def iterate(self):
        epoch = next(epochs) if self.loader.drop_last else None
        for index, batch in enumerate(batches(self)):
            if (rank, epoch, index) == (1, 1, 1):
                raise ValueError("dataset_path: expected an image")
            yield batch

    Batches.__iter__ = iterate


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_torchrun(folder):
    """One process writes; the measurements are those of one process."""
    done = run_script(*TORCHRUN, "-m", "mfac", *command(folder, "whole"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved in") == 1 == done.stderr.count("warning: pretrained: the recipe prunes random")
    assert "Warning" not in done.stderr
    assert files(folder / "whole") == ["checkpoint.pt", "model.pt", "model.txt"]
    model = MobileNetV1(10, 0.1, 1)
    model.load_state_dict(weights(folder / "whole" / "model.pt"))
    loss, top1, _ = evaluate(model, load_data().validation)
    text = (folder / "whole" / "model.txt").read_text()
    assert float(re.search("__loss__: (.*)", text)[1]) == pytest.approx(loss, rel=1e-5) and f"top1acc: {top1}" in text
    assert "asked 0.9" in text


def test_an_error_of_one_process_ends_all_and_the_run_goes_on(folder, capsys):
    """To the same weights, with as many processes; with fewer or more it goes on too."""
    if not (folder / "whole").exists():
        test_torchrun(folder)
    statuses, out, err = run(folder, *command(folder, "broken"), sabotage=fail_in_epoch_1)
    assert statuses == [2, 2] and "epoch 0 done" in out
    assert re.findall("mfac: error: .*", err) in (
        ["mfac: error: dataset_path: expected an image"], ["mfac: error: rank 1: dataset_path: expected an image"]
    )  # fmt: skip
    assert files(folder / "broken") == ["checkpoint.pt"]
    shutil.copytree(folder / "broken", folder / "alone")
    statuses, out, err = run(folder, *command(folder, "broken", "--resume"))
    assert statuses == [0, 0] and out.count("going on with epoch 1") == 1, err
    whole, resumed = (weights(folder / tag / "checkpoint.pt") for tag in ("whole", "broken"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert main(command(folder, "alone", "--resume")) == 0
    assert "the run was begun by 2 processes: 1 go on with other batches" in capsys.readouterr().out
    state = torch.load(folder / "alone" / "checkpoint.pt", weights_only=True)
    assert state["processes"] == 1 and state["epoch"] == 1
    assert "asked 0.9" in (folder / "alone" / "model.txt").read_text()


def test_a_run_of_one_process_goes_on_in_two(folder):
    statuses, out, err = run(folder, *command(folder, "one", "--resume"))
    assert statuses == [0, 0] and "the run was begun by 1 processes: 2 go on" in out, err


def test_ctrl_c(folder):
    children, store = start(folder, *command(folder, "stopped"), sabotage=slowly)
    for _ in range(600):
        if "epoch 1.50" in (folder / "0.out").read_text():
            break
        time.sleep(0.1)
    for child in children:
        os.kill(child.pid, signal.SIGINT)
    statuses, out, err = finish(folder, children, store)
    assert set(statuses) <= {1, 130} and 130 in statuses
    assert err.count("mfac: interrupted") == 1 and "mfac: error" not in err
    assert "after 1 epochs: the same command with --resume goes on from there" in out
    assert files(folder / "stopped") == ["checkpoint.pt"]


def slowly(rank):
    batches = Batches.__iter__

    def iterate(self):
        for index, batch in enumerate(batches(self)):
            time.sleep(0.3 * (index > 0 and rank == 0))
            yield batch

    Batches.__iter__ = iterate


def test_one_shot(folder):
    statuses, out, err = run(folder, *command(folder, "oneshot", "--one-shot"))
    assert statuses == [0, 0] and out.count("pruned to 90.0") == 1, err
    state = torch.load(folder / "oneshot" / "model.pt", weights_only=True)
    zeros = [(value == 0).double().mean() for name, value in state["model"].items() if ".point.conv" in name]
    assert max(zeros) > 0.85


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["compare", "a.md"], "torchrun: expected `mfac train`, which several processes run together, got compare"),
        (["train", "--recipe-path", "no.yaml"], "no.yaml"),
        (["train", "--recipe-path"], "requires an argument"),
        (["train", "--train-batch-size", "900"], "the number of training images of each of 2 processes, 718, got 900"),
    ],
)
def test_errors_are_said_once(folder, arguments, error):
    if "900" in arguments:
        arguments = [*arguments, "--recipe-path", str(folder / "r.yaml"), "--save-dir", str(folder / "none")]
    statuses, out, err = run(folder, *arguments)
    assert set(statuses) <= {1, 2} and 2 in statuses and not (folder / "none").exists()
    assert (out + err).count(error) == 1 == (out + err).count("rror")
