import torch

torch.set_num_threads(1)  # these tensors are small: threads that wait for each other cost 10 times
