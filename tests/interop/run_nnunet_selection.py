"""Run by the Python of an nnU-Net environment: its own accumulation of folds, or its choice of a configuration.

usage: run_nnunet_selection.py WORK DATASET accumulate|find_best CONFIGURATION ...

WORK holds ``raw``, ``preprocessed`` and ``results`` as nnU-Net lays them out; three folds are trained. Prints JSON.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

FOLDS = (0, 1, 2)


def main(work: str, dataset: str, what: str, *configurations: str) -> None:
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(Path(work) / name)
    with contextlib.redirect_stdout(io.StringIO()):
        from nnunetv2.evaluation.accumulate_cv_results import accumulate_cv_results
        from nnunetv2.evaluation.find_best_configuration import find_best_configuration
        from nnunetv2.utilities.file_path_utilities import get_output_folder

        if what == "accumulate":
            found = {}
            for name in configurations:
                model = get_output_folder(dataset, "nnUNetTrainer", "nnUNetPlans", name)
                found[name] = str(Path(model) / "crossval_results_folds_0_1_2")
                accumulate_cv_results(model, found[name], FOLDS, 1, True)
        else:
            models = [{"plans": "nnUNetPlans", "configuration": c, "trainer": "nnUNetTrainer"} for c in configurations]
            found = find_best_configuration(dataset, tuple(models), False, 1, False, FOLDS)
    print(json.dumps(found, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
