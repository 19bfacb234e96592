"""Train a network of a few thousand parameters with the real objective: answers that repeat their prompt.

Run it:  python examples/04_train_tiny.py
"""

from dataclasses import replace

import torch

from blockpress.config import Sampling, tiny
from blockpress.decoding import Done, SequenceState
from blockpress.decoding.generate import generate
from blockpress.model import Network
from blockpress.train.initialise import initialise
from blockpress.train.objective import Objective, TrainingBatch, draw_batch, losses
from blockpress.train.optimizer import OptimizerConfig, build_optimizers, set_rates

LENGTH, STEPS = 6, 300
config = replace(tiny(), vocab_size=10, canvas_length=LENGTH, sliding_window=16)
network, objective = Network(config), Objective(draws=2, stratified=True)
initialise(network, seed=0)
rule = OptimizerConfig(rate=3e-3, muon_rate=1e-2, warmup=10)
optimizers = build_optimizers(network, rule)
generator = torch.Generator().manual_seed(0)


def batch(rows: int) -> torch.Tensor:
    """Rows [rows, 12]: six random tokens from 2 to 9, then the same six as the answer."""
    prompt = torch.randint(2, 10, (rows, LENGTH), generator=generator)
    return torch.cat((prompt, prompt), dim=1)


for step in range(STEPS):
    set_rates(optimizers, rule.factor(step, STEPS))
    rows = TrainingBatch(batch(16), torch.full((16,), LENGTH), torch.ones(16, dtype=torch.long))
    loss = losses(network, rows, draw_batch(rows, LENGTH, config.vocab_size, objective, generator), objective)
    (loss.canvas + objective.causal_weight * loss.causal).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    if step % 100 == 99:
        print(f"step {step + 1}: canvas {loss.canvas:.3f} nats a token, causal {loss.causal:.3f}")

prompt = batch(1)[0, :LENGTH].tolist()
row = SequenceState(0, prompt, seed=0, stop_ids=(1,), canvas_length=LENGTH, room=LENGTH)
done = [event for event in generate(network.eval(), [row], Sampling()) if isinstance(event, Done)]
print(f"prompt {prompt}, answer {done[0].reply.tokens} in {done[0].reply.usage.steps} steps")
