"""The training loop: rows -> draw -> losses -> backward -> clip -> step, with reports and checkpoints.

Invariant: a step is a function of (weights, optimizer state, rollouts, seed, step). A stopped and resumed run continues
as an unbroken one would: nothing random lives outside (seed, step).
Run it:  blockpress train sudoku --out runs/sudoku
"""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from blockpress.checkpoints import load_network, minimal_vision, open_checkpoint, resolve, save_checkpoint
from blockpress.checkpoints.atomic import staged
from blockpress.errors import TrainingError
from blockpress.hardware import append_line, compute_dtype, machine
from blockpress.model import Network
from blockpress.ops import rows as row_wise
from blockpress.train import parallel
from blockpress.train.data import symmetries_of
from blockpress.train.initialise import initialise
from blockpress.train.objective import Draw, Losses, TrainingBatch, draw_batch, losses, rename_saved
from blockpress.train.optimizer import build_average, build_optimizers, set_rates
from blockpress.train.recipes import TrainingRecipe
from blockpress.train.rollouts import Rollouts
from blockpress.train.state import STATE, TrainReport, save_state

BUCKET = 64
"""Rows of a micro-batch are padded to a multiple of this many tokens: few lengths, so few graphs to compile."""


class Trainer:
    """A running recipe: the network, its optimizers and the step it has reached.

    Args:
        out: the run's directory. compiled: compile the losses. processes: how many prepare the data. steps: instead of
            the recipe's.
        init: a shipped name or a checkpoint's directory to start from; None: the recipe's, or random weights.
        dtype: of the products under autocast, float32 for none; None: bfloat16 where this machine multiplies it fast.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        out: Path,
        *,
        device: str = "cpu",
        compiled: bool = False,
        processes: int = 1,
        steps: int | None = None,
        init: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        parallel.join()
        self.recipe, self.out, self.device = recipe, out, device
        self.dtype = dtype or compute_dtype(torch.bfloat16, torch.device(device))
        if self.dtype == torch.int8:
            raise TrainingError(
                "BLOCKPRESS_COMPUTE_DTYPE is 'int8', which has no gradients",
                hint="unset it, or let --compute-dtype be bfloat16 or float32",
            )
        self.init = init or recipe.init
        if recipe.rows // recipe.micro < parallel.world_size():
            raise TrainingError(
                f"{parallel.world_size()} processes share {recipe.rows // recipe.micro} micro-batches a step",
                hint="start fewer: each process needs one at least",
            )
        self.steps, self._steps_given = recipe.steps if steps is None else steps, steps is not None
        self.step = 0
        self.seconds = 0.0
        self.segments = [{"from_step": 0} | self._settings()]
        vision, self._vision = minimal_vision(recipe.seed, recipe.config.hidden_size)
        self.network = Network(replace(recipe.config, vision=vision))
        self.before: dict[str, Any] | None = None
        if self.init is None:
            initialise(self.network, recipe.seed)
        else:
            self._load_initial(self.init)
        self.network.to(device)
        self.optimizers = build_optimizers(self.network, recipe.optimizer, self.dtype)
        decay, objective = recipe.optimizer.ema, recipe.objective
        self.average = None if decay is None else build_average(self.network, decay)
        slots = (self.network, objective, recipe.generation.sampling, recipe.rows, recipe.seed)
        self.rollouts = Rollouts(*slots) if objective.on_policy else None
        self.source = recipe.source(recipe.config, recipe.seed, processes, out)
        self._symmetries = symmetries_of(self.source) if objective.symmetries else None
        row_wise.load_library()
        self._losses = torch.compile(self._plain_losses, dynamic=False) if compiled else self._plain_losses

    def run(
        self, *, report_every: int = 20, save_seconds: float = 120.0, stop: Callable[[int], bool] | None = None
    ) -> Iterator[TrainReport]:
        """Train to the end, yielding a report every `report_every` steps; each is also a line of `log.jsonl`.

        Args:
            stop: called before every step with its number; true in any process saves the state and ends the run.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        started, saved, sums, since = time.perf_counter(), time.perf_counter(), torch.zeros(4), self.step
        before = self.seconds
        reported = started
        while self.step < self.steps:
            if stop is not None and parallel.anyone(stop(self.step)):
                if parallel.rank() == 0:
                    self.save()
                return
            sums += self.train_step()
            now = time.perf_counter()
            self.seconds = before + now - started
            if self.step % report_every == 0 or self.step == self.steps:
                report = self._report(sums, self.step - since, now - reported)
                sums, since, reported = torch.zeros(4), self.step, now
                if parallel.rank() == 0:
                    append_line(self.out / "log.jsonl", report.to_json(), kind=TrainingError)
                yield report
            if now - saved > save_seconds or self.step == self.steps:
                if parallel.rank() == 0:
                    self.save()
                saved = now

    def train_step(self) -> Tensor:
        """One optimizer step; returns [canvas loss, causal loss, accuracy, gradient norm].

        Raises:
            TrainingError: the loss or the gradient is not finite.
        """
        recipe, objective = self.recipe, self.recipe.objective
        factor = recipe.optimizer.factor(self.step, self.steps)
        set_rates(self.optimizers, factor)
        rows = self.source.rows(self.step, recipe.rows, self.step / self.steps)
        if self.rollouts is not None:
            rows = self.rollouts.rows(rows, self.step, self._symmetries)
        generator = torch.Generator().manual_seed((recipe.seed << 32) + self.step)
        # Rows of similar length share a micro-batch. Every process draws all of them, so that a draw does not depend
        # on which process runs it.
        parts = rows.lengths(recipe.config.canvas_length).argsort(stable=True).split(recipe.micro)
        sums, mine = torch.zeros(4, device=self.device), parts[parallel.rank() :: parallel.world_size()]
        for number, part in enumerate(parts):
            micro_batch = self._micro_batch(rows, part)
            visited = None if self.rollouts is None else self.rollouts.visited(part)
            config = recipe.config
            drawn = draw_batch(micro_batch, config.canvas_length, config.vocab_size, objective, generator, visited)
            if number % parallel.world_size() != parallel.rank():
                continue
            loss = self._losses(*self._tensors(micro_batch, drawn))
            ((loss.canvas + objective.causal_weight * loss.causal) / len(parts)).backward()
            sums[:3] += torch.stack((loss.canvas, loss.causal, loss.accuracy)).detach().float() / len(parts)
            if self.rollouts is not None and loss.logits is not None:
                self.rollouts.advance(self.network, part, loss.logits)
        if self.rollouts is not None:
            self.rollouts.share(torch.cat(mine))
        parallel.sum_over_processes([sums, *(p.grad for p in self.network.parameters() if p.grad is not None)])
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), recipe.optimizer.clip)
        sums[3] = norm.float()
        sums = sums.cpu()  # the only wait for the device: a step is queued as a whole
        if not math.isfinite(float(sums.sum())):
            raise TrainingError(
                f"step {self.step}: loss or gradient is not finite ({sums.tolist()})", hint=self._way_out()
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.network)
        self.step += 1
        return sums

    def save(self) -> None:
        """Write the state, all of it or nothing: an interrupted save leaves the older one.

        Raises:
            TrainingError: it cannot be written, as where the disk is full.
        """
        state = {
            "recipe": self.recipe.name,
            "step": self.step,
            "steps": self.steps,
            "seconds": self.seconds,
            "segments": self.segments,
            "before": self.before,
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        if self.average is not None:
            state["average"] = self.average.state_dict()
        if self.rollouts is not None:
            state["rollouts"] = self.rollouts.state()
        save_state(self.out / STATE, state)

    def export(self, directory: Path, *, raw: bool = False) -> None:
        """Write the network as a checkpoint in the published layout, with tokenizer and a minimal vision tower.

        Tensors are stored in bfloat16 and run in float32, as `config.json` says; `training.json` describes the run.
        `raw`: the weights of the last step, where the run keeps an average of them.

        Raises:
            CheckpointError: the directory cannot be written; what was there is unchanged.
        """
        recipe = self.recipe
        facts = {
            "recipe": recipe.name,
            "seed": recipe.seed,
            "weights": "of the last step" if self.average is None or raw else "their moving average",
            "step": self.step,
            "steps": self.steps,
            "draws": self._draws(),
            "seconds": round(self.seconds),
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "hardware": machine(),
            "segments": self.segments,
        } | ({} if self.before is None else {"before": self.before})
        with staged(directory) as staging:
            save_checkpoint(
                staging,
                self.network if self.average is None or raw else cast(Network, self.average.module),
                generation=recipe.generation,
                kept=self._vision,
                dtype=torch.bfloat16,
                run_dtype=torch.float32,
            )
            recipe.write_tokenizer(staging)
            (staging / "training.json").write_text(json.dumps(facts, indent=1) + "\n")

    def resume(self) -> None:
        """Continue from the state in the run's directory.

        Raises:
            TrainingError: there is none, it cannot be read, or it belongs to another recipe.
        """
        path = self.out / STATE
        if not path.is_file():
            raise TrainingError(f"no state to resume in {self.out}", hint="leave --resume out, or give the run's --out")
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            made_by, steps = state["recipe"], state["steps"]
            if made_by != self.recipe.name:
                raise TrainingError(
                    f"{path} is a run of recipe {made_by!r}",
                    hint=f"resume it with that recipe, not {self.recipe.name!r}",
                )
            self.step, self.seconds, self.segments = state["step"], state["seconds"], rename_saved(state["segments"])
            self.init, self.before = self.segments[0].get("init"), rename_saved(state.get("before"))
            self.network.load_state_dict(state["network"])
            for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
                bases = [group["base"] for group in optimizer.param_groups]
                optimizer.load_state_dict(kept)
                for group, base in zip(optimizer.param_groups, bases, strict=True):
                    group["base"] = base
            if self.average is not None and "average" in state:
                self.average.load_state_dict(state["average"])
            elif self.average is not None:
                self.average.module.load_state_dict(state["network"])
            if self.rollouts is not None and "rollouts" in state:
                self.rollouts.load(state["rollouts"])
        except (OSError, RuntimeError, ValueError, LookupError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise TrainingError(f"{path} cannot be resumed: {error}", hint="delete it and start afresh") from error
        self.steps = self.steps if self._steps_given else steps
        now = self._settings()
        if {k: v for k, v in self.segments[-1].items() if k != "from_step"} != now:
            self.segments.append({"from_step": self.step} | now)

    def _settings(self) -> dict[str, Any]:
        """All that a step depends on besides the data, in plain values: a run resumed with others records both."""
        recipe = self.recipe
        parts = {"objective": asdict(recipe.objective), "optimizer": asdict(recipe.optimizer)}
        initial = {} if self.init is None else {"init": self.init}
        kind = str(self.dtype).removeprefix("torch.")
        settings = {"steps": self.steps, "rows": recipe.rows, "processes": parallel.world_size(), "dtype": kind}
        return initial | settings | parts

    def _way_out(self) -> str:
        """What to do about a loss that is not finite."""
        saved = (self.out / STATE).is_file()
        again = "--resume goes on from the last saved state" if saved else "no state to --resume is saved: start again"
        if self.dtype != torch.float32:
            return f"{again}: give --compute-dtype float32"
        return f"{again}: lower OptimizerConfig.rate ({self.recipe.optimizer.rate}) of the recipe in train/recipes.py"

    def _draws(self) -> int:
        """Canvases drawn so far, over all segments."""
        ends = [segment["from_step"] for segment in self.segments[1:]] + [self.step]
        return sum(
            (end - segment["from_step"]) * segment["rows"] * segment["objective"]["draws"]
            for segment, end in zip(self.segments, ends, strict=True)
        )

    def _load_initial(self, init: str) -> None:
        """Start from the weights of a checkpoint.

        Raises:
            TrainingError: its config is another. CheckpointError and its subclasses: it cannot be read.
        """
        path, ours = resolve(init), self.recipe.config
        checkpoint = open_checkpoint(path)
        theirs = replace(checkpoint.config, vision=ours.vision)
        compared = [field.name for field in fields(ours) if field.compare]
        if others := [name for name in compared if getattr(theirs, name) != getattr(ours, name)]:
            raise TrainingError(
                f"init is {init!r}, whose config is another than recipe {self.recipe.name!r} has: {', '.join(others)}",
                hint="give a checkpoint of the recipe's own network, or leave it out",
            )
        loaded = load_network(checkpoint, dtype=torch.float32, compute_dtype=torch.float32)
        self.network.load_state_dict(loaded.state_dict())
        if (path / "training.json").is_file():
            self.before = rename_saved(json.loads((path / "training.json").read_text()))

    def _plain_losses(self, tokens: Tensor, prompts: Tensor, canvases: Tensor, *drawn: Tensor) -> Losses:
        fast = self.dtype != torch.float32
        with torch.autocast(self.device, dtype=self.dtype) if fast else nullcontext():
            return losses(self.network, TrainingBatch(tokens, prompts, canvases), Draw(*drawn), self.recipe.objective)

    def _micro_batch(self, rows: TrainingBatch, part: Tensor) -> TrainingBatch:
        """Some rows, padded to the bucket of the longest."""
        longest = int(rows.lengths(self.recipe.config.canvas_length)[part].max())
        return rows.part(part, min(-(-longest // BUCKET) * BUCKET, rows.tokens.shape[1]))

    def _tensors(self, rows: TrainingBatch, drawn: Draw) -> list[Tensor]:
        tokens = rows.tokens
        if not self.recipe.objective.causal_weight:  # then tokens that no canvas attends to are not needed
            tokens = tokens[:, : int(drawn.starts.max())]
        parts = [tokens, rows.prompts, rows.canvases, drawn.starts, drawn.clean, drawn.noisy, drawn.conditioned]
        parts += [part for part in (drawn.visited, drawn.signal) if part is not None]
        return [x.to(self.device) for x in parts]

    def _report(self, sums: Tensor, count: int, seconds: float) -> TrainReport:
        canvas, causal, accuracy, norm = (sums / count).tolist()
        draws = self.recipe.rows * self.recipe.objective.draws
        return TrainReport(
            step=self.step,
            steps=self.steps,
            canvas_loss=canvas,
            causal_loss=causal,
            accuracy=accuracy,
            gradient_norm=norm,
            rate=self.recipe.optimizer.factor(self.step - 1, self.steps),
            draws=self._draws(),
            draws_per_second=count * draws / seconds,
            seconds=self.seconds,
        )
