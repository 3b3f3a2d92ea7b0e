"""The step under DeepSpeed's ZeRO stages, tied word table and batches of padding included; stage 3,
which hides parameters from modules that do not have them, for every other objective too."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

STAGES = {  # of each objective; with a word table shared alone, whose generator has embeddings too
    "electra": (0, 1, 2, 3), "electra_15": (3,), "replace_mlm": (3,), "all_tokens_mlm": (0, 3),
    "mlm": (3,),
}  # fmt: skip
STEPS = 3


def test_all_zero_stages_train_like_plain_torch():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    result = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, **alone, "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    losses = json.loads(result.stdout.splitlines()[-1])
    assert list(losses) == list(STAGES)
    for objective, found in losses.items():
        plain = found.pop("plain")
        assert plain[-1] < plain[0]
        assert list(found) == [str(stage) for stage in STAGES[objective]]
        for stage, values in found.items():
            assert values == pytest.approx(plain, rel=1e-5), f"{objective}, stage {stage}"


def main():
    """Print the losses of a few steps, plainly and under each stage, as JSON on the last line."""
    import dataclasses

    import deepspeed
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    from packing import packed_batch

    from fastelectra.config import ModelConfig, ObjectiveConfig
    from fastelectra.model import Electra

    sizes = ModelConfig(
        layers=2, hidden_size=24, intermediate_size=40, heads=4, embedding_size=16,
        generator_fraction=0.5, max_positions=40, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    batches = [
        packed_batch([40, 3, 17], 61, seed=1),
        packed_batch([1, 22], 61, seed=2),
        packed_batch([], 61, room=(30, 3, 8)),
    ]

    def start(objective):
        torch.manual_seed(0)
        sharing = "tokens" if objective == "all_tokens_mlm" else "all"
        model = dataclasses.replace(sizes, embedding_sharing=sharing)
        electra = Electra(model, 61, ObjectiveConfig(objective))
        return electra, torch.optim.AdamW(electra.parameters(), lr=1e-2)

    def plainly(objective):
        electra, optimizer = start(objective)
        losses = []
        for _ in range(STEPS):
            for batch in batches:
                loss, _ = electra(batch)
                (loss / len(batches)).backward()
                losses.append(loss.item())
            torch.nn.utils.clip_grad_norm_(electra.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return losses

    def under(stage, objective):
        electra, optimizer = start(objective)
        zero = {"stage": stage}
        if stage == 3:  # partition even the smallest parameter
            zero |= {"stage3_param_persistence_threshold": 0, "memory_efficient_linear": False}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": len(batches),
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": zero,
        }
        engine, *_ = deepspeed.initialize(model=electra, optimizer=optimizer, config=config)
        losses = []
        for _ in range(STEPS):
            for batch in batches:
                loss, _ = engine(batch)
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
        return losses

    # its only user is inference, and building it needs a compiler
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    found = {
        objective: {"plain": plainly(objective)}
        | {stage: under(stage, objective) for stage in stages}
        for objective, stages in STAGES.items()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
