"""Train the miniature from nothing: `python -m ditune.miniature.train --run DIR`.

Stages run in order and are skipped when their result is in the run folder; a killed stage goes on
from its last checkpoint. `export` writes the folder that the package ships. A whole run takes about
two hours on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from transformers import UMT5EncoderModel

from ditune.miniature import architecture, codec, flow, recipe
from ditune.miniature.architecture import Size
from ditune.miniature.flow import FlowTrainer, Schedule
from ditune.miniature.system import WEIGHTS

SHALLOW_LAYERS = 10
CHECKPOINT_EVERY = 100  # steps
_DENOISERS = ("shallow", "large", "young", "small")


@dataclass(frozen=True)
class Recipe:
    """Every number of the run; the shipped weights were made with the defaults."""

    seed: int = 0
    text_steps: int = 300
    pca_clips: int = 4000
    judge_steps: int = 1500
    decoder_steps: int = 3000
    shallow: Schedule = field(default_factory=lambda: Schedule(steps=2000, batch=64, end=0.35))
    large: Schedule = field(default_factory=lambda: Schedule(steps=200, batch=64, start=0.35))
    young: Schedule = field(default_factory=lambda: Schedule(steps=4000, batch=64))
    small: Schedule = field(
        default_factory=lambda: Schedule(steps=2000, batch=64, start=0.6, below=0.55)
    )


class Run:
    """A run folder: results by stage, checkpoints, and a log with one JSON object per line."""

    def __init__(
        self, folder: Path, recipe_: Recipe, processes: int = 1, *, compiled: bool = False
    ) -> None:
        """Open or create the folder; denoisers are trained in so many processes."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder.resolve()
        self.processes = processes
        self.compiled = compiled
        self.recipe = recipe_
        (folder / "recipe.json").write_text(json.dumps(asdict(recipe_), indent=2) + "\n")

    def log(self, stage: str, step: int, loss: float) -> None:
        """Append one line to the log."""
        line = {"time": round(time.time(), 1), "stage": stage, "step": step, "loss": round(loss, 5)}
        with (self.folder / "log.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def logger(self, stage: str, every: int = 50) -> Callable[[int, float], None]:
        """Return a function that logs every so many steps of a stage."""

        def log(step: int, loss: float) -> None:
            if step % every == 0:
                self.log(stage, step, loss)

        return log

    def done(self, name: str) -> bool:
        """Whether a stage has left its result."""
        return (self.folder / name).exists()

    def text(self) -> UMT5EncoderModel:
        """Return the trained text encoder."""
        return UMT5EncoderModel.from_pretrained(self.folder / "text_encoder").eval()

    def pca(self) -> codec.PatchPca:
        """Return the fitted patch PCA."""
        return codec.PatchPca(**load_file(self.folder / "pca.safetensors"))


def text_stage(run: Run) -> None:
    """Train the text encoder."""
    encoder = recipe.train_text_encoder(run.recipe.seed, run.recipe.text_steps)
    encoder.save_pretrained(run.folder / "text_encoder")


def judge_stage(run: Run) -> None:
    """Train the judge."""
    settings = run.recipe
    model = recipe.train_judge(settings.seed + 1, settings.judge_steps, run.logger("judge"))
    save_file(model.state_dict(), run.folder / "judge.safetensors")


def pca_stage(run: Run) -> None:
    """Fit the patch PCA."""
    pca = recipe.fit_pca(run.recipe.seed + 2, run.recipe.pca_clips)
    tensors = {name: value.contiguous() for name, value in vars(pca).items()}
    save_file(tensors, run.folder / "pca.safetensors")


def vae_stage(run: Run) -> None:
    """Write the PCA into a VAE and train its decoder."""
    pca = run.pca()
    vae = codec.build(pca)
    settings = run.recipe
    recipe.train_decoder(vae, pca, settings.seed + 3, settings.decoder_steps, run.logger("vae"))
    vae.save_pretrained(run.folder / "vae")


def shallow_stage(run: Run) -> None:
    """Train the large model's shallow form."""
    _train_denoiser(run, "shallow")


def large_stage(run: Run) -> None:
    """Grow the shallow model to its full depth and train on."""
    _train_denoiser(run, "large")


def young_stage(run: Run) -> None:
    """Train the small model on all noise levels."""
    _train_denoiser(run, "young")


def small_stage(run: Run) -> None:
    """Train the small model on, half of it at the last noise levels, which it would spoil."""
    _train_denoiser(run, "small")


def _beginning(run: Run, stage: str) -> tuple[WanTransformer3DModel, Schedule]:
    """Return the untrained model of a stage, the same in every process, and its schedule."""
    settings = run.recipe
    torch.manual_seed(settings.seed + 4 + _DENOISERS.index(stage))
    if stage == "large":
        shallow = WanTransformer3DModel.from_pretrained(run.folder / "shallow")
        layers = architecture.TRANSFORMERS["large"]["num_layers"]
        return flow.grow(shallow, "large", layers), settings.large
    if stage == "small":
        return WanTransformer3DModel.from_pretrained(run.folder / "young"), settings.small
    if stage == "shallow":
        model, schedule = architecture.transformer("large", SHALLOW_LAYERS), settings.shallow
    else:
        model, schedule = architecture.transformer("small"), settings.young
    torch.nn.init.zeros_(model.proj_out.weight)
    return model, schedule


def _train_denoiser(run: Run, stage: str) -> None:
    """Train a stage in as many processes as the run has."""
    if run.processes == 1:
        _train_share(0, run, stage)
        return
    rendezvous = run.folder / f"{stage}.rendezvous"
    rendezvous.unlink(missing_ok=True)
    spawn(_join_and_train, (run, stage, rendezvous), run.processes)
    rendezvous.unlink(missing_ok=True)


def _join_and_train(rank: int, run: Run, stage: str, rendezvous: Path) -> None:
    """Be one process of several."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=run.processes
    )
    try:
        _train_share(rank, run, stage)
    finally:
        torch.distributed.destroy_process_group()


def _train_share(rank: int, run: Run, stage: str) -> None:
    """Train with checkpoints; leaves the moving average as a diffusers folder."""
    model, schedule = _beginning(run, stage)
    text = recipe.text_table(run.text())
    trainer = FlowTrainer(model, run.pca(), text, schedule, compiled=run.compiled)
    checkpoint = run.folder / f"{stage}.checkpoint.pt"
    if checkpoint.exists():
        trainer.resume(checkpoint)
    while trainer.step < schedule.steps:
        loss = trainer.advance()
        if rank == 0 and trainer.step % 10 == 0:
            run.log(stage, trainer.step, loss)
        if rank == 0 and trainer.step % CHECKPOINT_EVERY == 0:
            trainer.save(checkpoint)
    if rank == 0:
        trainer.ema.save_pretrained(run.folder / stage)


def export_stage(run: Run, target: Path = WEIGHTS) -> None:
    """Write the shipped folder: every part in half precision where that costs nothing."""
    sizes: dict[Size, str] = {"large": "transformer", "small": "transformer_small"}
    for size, name in sizes.items():
        WanTransformer3DModel.from_pretrained(run.folder / size).half().save_pretrained(
            target / name
        )
    AutoencoderKLWan.from_pretrained(run.folder / "vae").save_pretrained(target / "vae")
    run.text().save_pretrained(target / "text_encoder")
    architecture.tokenizer().save_pretrained(target / "tokenizer")
    architecture.scheduler().save_pretrained(target / "scheduler")
    judge: dict[str, Tensor] = load_file(run.folder / "judge.safetensors")
    for config in target.rglob("config.json"):  # diffusers notes where a model was loaded from
        kept = json.loads(config.read_text(encoding="utf-8"))
        kept.pop("_name_or_path", None)
        config.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    (target / "judge").mkdir(parents=True, exist_ok=True)
    save_file(judge, target / "judge" / "judge.safetensors")


STAGES: dict[str, tuple[Callable[[Run], None], str]] = {  # name -> what runs, what it leaves
    "text": (text_stage, "text_encoder"),
    "pca": (pca_stage, "pca.safetensors"),
    "judge": (judge_stage, "judge.safetensors"),
    "vae": (vae_stage, "vae"),
    "young": (young_stage, "young"),
    "small": (small_stage, "small"),
    "shallow": (shallow_stage, "shallow"),
    "large": (large_stage, "large"),
    "export": (export_stage, "exported"),
}


def main() -> None:
    """Run the stages that are asked for and not done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints and log")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    cores = torch.get_num_threads()
    parser.add_argument("--processes", type=int, default=cores, help="of one thread each")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the blocks: faster, but needs a C++ compiler",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.processes > 1 else cores)
    run = Run(arguments.run, Recipe(), arguments.processes, compiled=arguments.compile)
    for name in arguments.stages:
        stage, leaves = STAGES[name]
        if not run.done(leaves):
            stage(run)


if __name__ == "__main__":
    main()
