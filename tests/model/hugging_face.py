"""One of our networks as a model of transformers."""

import torch
from transformers import ElectraConfig, ElectraForMaskedLM

from fastelectra.config import generator_sizes
from fastelectra.model.hub_names import to_hub


def theirs(electra, network, vocab_size, model_class):
    """transformers' model with the weights of one of our networks, [PAD]'s row trained."""
    model = electra.config
    sizes = model.hidden_size, model.intermediate_size, model.heads
    hidden, intermediate, heads = generator_sizes(model) if network == "generator" else sizes
    config = ElectraConfig(
        vocab_size=vocab_size,
        embedding_size=model.embedding_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_hidden_layers=model.layers,
        max_position_embeddings=model.max_positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=None,
    )
    with torch.device("meta"):
        module = model_class(config)
    ours = {name: value.detach() for name, value in electra.named_parameters()}
    predicts = model_class is ElectraForMaskedLM
    weights = to_hub(ours, network, predicts)
    if predicts:
        weights["generator_lm_head.weight"] = weights["electra.embeddings.word_embeddings.weight"]
    module.to_empty(device="cpu").load_state_dict(weights, assign=True)
    for part in module.modules():  # buffers that are not saved
        if hasattr(part, "position_ids"):
            part.position_ids = torch.arange(model.max_positions)[None]
            part.token_type_ids = torch.zeros_like(part.position_ids)
    return module
