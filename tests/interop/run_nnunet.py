"""Run by the Python of an nnU-Net environment: predict a folder with a result folder, on the CPU, in one process.

usage: run_nnunet.py RESULT_FOLDER INPUT OUTPUT FOLD [PREVIOUS]
"""

import contextlib
import io
import sys

import torch

torch.set_num_threads(1)
with contextlib.redirect_stdout(io.StringIO()):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    model, inputs, output, fold, *previous = sys.argv[1:]
    predictor = nnUNetPredictor(use_mirroring=True, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(model, (fold,))
    predictor.predict_from_files_sequential(inputs, output, False, True, previous[0] if previous else None)
