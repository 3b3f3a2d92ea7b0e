"""Runs one after another in the same processes, to save starting them: many_runs.py CONFIG …

Under torchrun or alone. The process group stays, DeepSpeed starts anew for each.
"""

import sys

import torch

from fastelectra import train

if __name__ == "__main__":
    torch.distributed.destroy_process_group = lambda: None
    sys.exit(max(train.main(["--config", config]) for config in sys.argv[1:]))
