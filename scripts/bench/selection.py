"""Whether held-out cases confirm what ``medseg select`` chose: hippocampus, three folds, ``2d`` and ``3d_fullres``.

Usage: python scripts/bench/selection.py WORK [--seconds 180] [--train-cases 160] [--held-out 40] [--device cpu]

Links cases of the data set into WORK/data (a fixed split: 160 to train and validate, 40 held out), plans, prepares,
trains every fold for --seconds, selects, predicts the held-out cases by every candidate with the post-processing that
its cross-validation speaks for, scores them, and writes WORK/run/report.html. Prints cross-validated and held-out mean
Dice of every candidate, and whether one is better than the choice on the held-out cases beyond chance. The same command
goes on where a stopped one was. Time: about configurations × folds × seconds, and some minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np

from medseg.evaluation.bootstrap import mean_interval
from medseg.evaluation.crossfit import cross_fit, parts_of
from medseg.evaluation.pairs import read_pair
from medseg.pipeline.run_folder import RunFolder
from medseg.records.base import read_record, write_record
from medseg.records.model import ModelCard
from medseg.records.plan import Plan
from medseg.records.scores import Scores
from medseg.records.selection import Candidate, Member, Selection

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "hippocampus"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the data set, the run, predictions and scores")
    parser.add_argument(
        "--data", type=Path, default=DATA, help="hippocampus with split_160_40.json (default: ../shared)"
    )
    parser.add_argument("--seconds", type=float, default=180, help="of training for each fold (default: 180)")
    parser.add_argument("--folds", type=int, default=3, help="default: 3")
    parser.add_argument("--configurations", nargs="+", default=["2d", "3d_fullres"], help="default: 2d 3d_fullres")
    parser.add_argument("--train-cases", type=int, default=160, help="of the 160 (default: all)")
    parser.add_argument("--held-out", type=int, default=40, help="of the 40 (default: all)")
    parser.add_argument("--device", default="auto", help="as for medseg train")
    arguments = parser.parse_args()
    data, run = arguments.work / "data", arguments.work / "run"
    link_cases(arguments.data, data, arguments.train_cases, arguments.held_out)
    device = ["--device", arguments.device]
    medseg("plan", data, "--run", run, "--split-folds", arguments.folds)
    for name in arguments.configurations:
        medseg("preprocess", "--run", run, "--configuration", name)
    for fold in range(arguments.folds):
        for name in arguments.configurations:
            length = ["--time-budget", f"{arguments.seconds:g}s"]
            medseg("train", "--run", run, "--configuration", name, "--fold", fold, *length, *device)
    medseg("select", "--run", run, "--configuration", *arguments.configurations, *device)
    selection = read_record(run / "selection.json", Selection)
    held_out = {}
    for candidate in selection.candidates:
        recipe = write_recipe(run, arguments.work / "recipes" / candidate.name.replace(" ", ""), candidate)
        held_out[candidate.name] = predicted(recipe, data, arguments.work / "held_out" / recipe.name, device)
    tell(selection, held_out)
    medseg("predict", "--model", run, "-i", data / "imagesTs", "-o", run / "predictions", *device)
    score(run / "predictions", data, run / "scores" / "held-out.json")
    medseg("report", "--run", run)


def medseg(*arguments: object) -> None:
    """Run a command of medseg, saying which."""
    words = [str(argument) for argument in arguments]
    print("medseg", *words, flush=True)
    subprocess.run([sys.executable, "-m", "medseg", *words, "--progress", "none"], check=True)


def link_cases(source: Path, target: Path, train: int, held_out: int) -> None:
    """A data set of links: every n-th case of both parts of the fixed split."""
    split = json.loads((source / "split_160_40.json").read_text())
    split = split[0] if isinstance(split, list) else split
    wanted = ((spread(split["train"], train), "Tr"), (spread(split["val"], held_out), "Ts"))
    for cases, part in wanted:
        for case in cases:
            for kind, name in (("images", f"{case}_0000.nii.gz"), ("labels", f"{case}.nii.gz")):
                link = target / f"{kind}{part}" / name
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists():
                    link.symlink_to((source / f"{kind}Tr" / name).resolve())
    declaration = json.loads((source / "dataset.json").read_text()) | {"numTraining": len(wanted[0][0])}
    (target / "dataset.json").write_text(json.dumps(declaration))


def spread(cases: list[str], number: int) -> list[str]:
    """That many of the cases, evenly."""
    return [cases[i] for i in np.linspace(0, len(cases) - 1, min(number, len(cases))).round().astype(int)]


def write_recipe(run: Path, folder: Path, candidate: Candidate) -> Path:
    """A folder that predicts as the candidate would if it were chosen, with the models of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("models", "plan.json", "dataset.json", "splits.json"):
        if not (folder / name).exists():
            (folder / name).symlink_to((run / name).resolve())
    task = read_record(run / "plan.json", Plan).task
    folds = [fold["val"] for fold in json.loads((run / "splits.json").read_text())["folds"]]
    fold_of = {case: str(number) for number, cases in enumerate(folds) for case in cases}
    labels = {case.id: case.label for case in RunFolder(run).read_dataset().cases}
    cases = sorted(fold_of)
    opened = []
    for case in cases:
        single = run / "models" / candidate.configurations[0] / f"fold_{fold_of[case]}" / "validation"
        place = single if len(candidate.configurations) == 1 else run / "selection" / "+".join(candidate.configurations)
        opened.append(partial(read_pair, (case, place / f"{case}.nii.gz", labels[case]), task))
    judged = cross_fit(opened, parts_of([fold_of[case] for case in cases]), task)
    members = []
    for name in candidate.configurations:
        cards = [read_record(run / "models" / name / f"fold_{k}" / "model.json", ModelCard) for k in range(len(folds))]
        hashes, numbers = tuple(card.weights_sha256 for card in cards), tuple(card.fold for card in cards)
        weight = 1 / len(candidate.configurations)
        members.append(Member(configuration=name, folds=numbers, weights_sha256=hashes, weight=weight))
    chosen = read_record(run / "selection.json", Selection)
    update = {"members": tuple(members), "postprocessing": judged.postprocessing}
    write_record(folder / "selection.json", chosen.model_copy(update=update))
    return folder


def predicted(recipe: Path, data: Path, output: Path, device: list[str]) -> Scores:
    """Scores of the held-out cases."""
    medseg("predict", "--model", recipe, "-i", data / "imagesTs", "-o", output, *device)
    return score(output, data, output.with_name(f"{output.name}.json"))


def score(predictions: Path, data: Path, output: Path) -> Scores:
    output.parent.mkdir(parents=True, exist_ok=True)
    references = ["--references", data / "labelsTs", "--task", data]
    medseg("evaluate", "--predictions", predictions, *references, "--output", output)
    return read_record(output, Scores)


def table(scores: Scores) -> np.ndarray:
    """Dice (cases, labels); nan where both masks are empty."""
    rows = {(row.case, row.label): row.dice for row in scores.cases}
    cases, labels = sorted({row.case for row in scores.cases}), [summary.label for summary in scores.labels]
    return np.array([[rows[case, label] for label in labels] for case in cases], dtype=float)


def tell(selection: Selection, held_out: dict[str, Scores]) -> None:
    """The figures of every candidate, and the verdict."""
    chosen = " + ".join(member.configuration for member in selection.members)
    base, better = table(held_out[chosen]), []
    print(f"\n{'candidate':24} {'cross-validated':>15} {'held out':>9}   difference to the choice (95 % interval)")
    for candidate in selection.candidates:
        scores = held_out[candidate.name]
        gain = table(scores) - base
        interval = mean_interval(gain)
        told = "chosen"
        if candidate.name != chosen and interval is not None:
            told = f"{np.nanmean(gain):+.4f} ({interval[0]:+.4f} to {interval[1]:+.4f})"
            better += [candidate.name] if interval[0] > 0 else []
        print(f"{candidate.name:24} {candidate.mean_dice or 0:15.4f} {scores.mean_dice or 0:9.4f}   {told}")
    highest = max(held_out, key=lambda name: held_out[name].mean_dice or 0)
    verdict = (
        f"not confirmed: better beyond chance is {', '.join(better)}"
        if better
        else "confirmed: none is better beyond chance"
    )
    print(f"choice {chosen}: {verdict}; the highest held-out mean is that of {highest}")


if __name__ == "__main__":
    main()
