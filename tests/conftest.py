"""What all tests share."""

import torch

# Runs are compared bit by bit, some of them in forked processes, which have one thread.
torch.set_num_threads(1)
