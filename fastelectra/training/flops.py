"""How much arithmetic a token costs and a GPU can do: model FLOPs utilisation (MFU)."""

import torch

from fastelectra.config import Config, generator_sizes

# Dense bf16 TFLOP/s from NVIDIA's data sheets, by a part of the device's name; first match counts.
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "RTX 4090": 165,
    "RTX A6000": 155,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that this GPU's data sheet promises in 16 bit; None when it is not known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), None)


def flops_per_token(config: Config, vocab_size: int) -> float:
    """Matrix-product FLOPs of one training token, both networks, backward = 2 × forward.

    Embeddings are look-ups, the vocabulary product is done at the masked share of the positions,
    every token attends to an example of the full length.
    """
    model, share = config.model, config.data.mask_fraction
    generator = generator_sizes(model)
    forward = 0.0
    for hidden, intermediate, _ in ((model.hidden_size, model.intermediate_size, 0), generator):
        layer = 8 * hidden**2 + 4 * hidden * intermediate + 4 * config.data.max_length * hidden
        project = 2 * model.embedding_size * hidden if hidden != model.embedding_size else 0
        forward += model.layers * layer + project
    forward += 2 * model.hidden_size * (model.hidden_size + 1)  # discriminator head
    forward += share * 2 * model.embedding_size * (generator[0] + vocab_size)  # generator head
    return 3 * forward
