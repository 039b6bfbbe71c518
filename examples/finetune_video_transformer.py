r"""Fine-tune a Wan video transformer for sparse attention, by distillation from itself.

    python examples/finetune_video_transformer.py --smoke      # tiny random weights, on a CPU, within a minute
    torchrun --nproc-per-node 8 examples/finetune_video_transformer.py --model Wan2.1-T2V-1.3B/transformer \
        --data latents --out wan-sparse                        # or: accelerate launch …

``--model`` is a folder that diffusers' ``from_pretrained`` reads. ``--data`` holds one .safetensors file for each clip:
``latents`` [C, T, H, W], scaled as the model expects them, and ``text`` [S, D], the text encoder's output for its
caption. Clips of one size, please: each other size is compiled for anew. The data only supply noisy inputs; the loss is
the difference between the student's and the frozen teacher's velocity.

``--out`` gets model and thresholds together, log.csv and, on the way, checkpoints: the same command goes on from the
last one. Inference is then one line:

    torch.compile(model, backend="sparge", options={"calibration": "wan-sparse/sparge.json"})
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparge_compile import Calibration, DistillationHook, SparsitySchedule, attach

RISE = 20  # steps in which the learning rate rises; then it falls as a cosine
TILE = (4, 4, 4)  # frames, rows and columns of a block's tokens
SITES = "blocks.*.attn1"  # self-attention; attention to the text has too few keys to be sparse


class Clips:
    """Noisy clips for each step. What a step gets depends on its number alone, so that a resumed run sees the same."""

    def __init__(self, folder: Path, args: argparse.Namespace, accelerator: Accelerator) -> None:
        self.files = sorted(folder.glob("*.safetensors"))
        if not self.files:
            raise SystemExit(f"{folder} holds no .safetensors files with latents and text.")
        self.args, self.rank, self.world = args, accelerator.process_index, accelerator.num_processes
        self.device = accelerator.device

    def batch(self, number: int) -> dict[str, Any]:
        """The model's arguments for a micro-batch: x_t = (1 - σ) x + σ noise, and the timestep 1000 σ."""
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + number * self.world + self.rank)
        chosen = torch.randint(len(self.files), (self.args.batch_size,), generator=generator)
        clips = [load_file(self.files[i]) for i in chosen]
        latents, text = (torch.stack([clip[name] for clip in clips]).float() for name in ("latents", "text"))
        sigma = torch.rand(len(clips), generator=generator)
        sigma = self.args.shift * sigma / (1 + (self.args.shift - 1) * sigma)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1))
        inputs = {"hidden_states": noisy, "timestep": 1000 * sigma, "encoder_hidden_states": text}
        return {**{name: x.to(self.device) for name, x in inputs.items()}, "return_dict": False}


class Progress:
    """How many steps are done, for the checkpoint."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class Log:
    """Rows of log.csv, and curves for TensorBoard if asked. A resumed run drops the rows that it does again."""

    def __init__(self, folder: Path, done: int, with_tensorboard: bool) -> None:
        self.path, self.rows = folder / "log.csv", [("step", "loss", "seconds")]
        if done and self.path.exists():
            with self.path.open() as file:
                self.rows = [row for row in csv.reader(file) if row[0] == "step" or int(row[0]) <= done]
        self.writer = None
        if with_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder / "tensorboard")

    def add(self, step: int, loss: float, seconds: float) -> None:
        print(f"step {step}: loss {loss:.6f}, {seconds:.2f} s", flush=True)
        self.rows.append((step, f"{loss:.8f}", f"{seconds:.3f}"))
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerows(self.rows)
        if self.writer is not None:
            self.writer.add_scalar("loss", loss, step)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """It depends on the step alone, so that a resumed run goes on with it."""
    return args.lr * min(1.0, (step + 1) / RISE) * (1 + math.cos(math.pi * step / args.steps)) / 2


def thresholds(args: argparse.Namespace) -> Calibration:
    if args.calibration:
        return Calibration.load(args.calibration)
    return Calibration({SITES: [(args.topk, args.topp)]}, tiles={SITES: TILE} if args.order == "tiles" else {})


def train(args: argparse.Namespace) -> None:
    accelerator = Accelerator(gradient_accumulation_steps=args.accumulate, cpu=args.cpu)
    set_seed(args.seed)
    model = WanTransformer3DModel.from_pretrained(args.model).train()
    teacher = None if args.lora else copy.deepcopy(model).to(accelerator.device)  # before anything is done to it
    if args.lora:
        from peft import LoraConfig

        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=args.lora, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    patch = model.config.patch_size

    def grid(hidden_states: Tensor, **rest: Any) -> tuple[int, ...]:
        """Tokens along frames, height and width: a block by itself does not show them."""
        return tuple(size // each for size, each in zip(hidden_states.shape[2:], patch, strict=True))

    attached = attach(model, thresholds(args), grid=grid)
    model.enable_gradient_checkpointing()
    options = {"inner": args.inner, "min_seq_len": args.min_seq_len}
    model.compile_repeated_blocks(backend="sparge", fullgraph=True, options=options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay)
    student, optimizer = accelerator.prepare(model, optimizer)
    hook = DistillationHook(student, teacher, layers=args.layers)
    schedule, progress = SparsitySchedule(attached, steps=args.anneal), Progress()
    accelerator.register_for_checkpointing(hook, schedule, progress)
    checkpoints = sorted((args.out / "checkpoints").glob("step-*"))
    if checkpoints:
        accelerator.load_state(str(checkpoints[-1]))
        accelerator.print(f"goes on after step {progress.step}")

    clips = Clips(args.data, args, accelerator)
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out, progress.step, args.tensorboard) if accelerator.is_main_process else None
    while progress.step < min(args.steps, args.stop_after or args.steps):
        start, losses = time.perf_counter(), []
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress.step, args)
        for part in range(args.accumulate):
            with accelerator.accumulate(student):
                with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=not (args.cpu or args.smoke)):
                    student(**clips.batch(progress.step * args.accumulate + part))
                loss = hook.loss()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        schedule.step()
        progress.step += 1
        loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        if log is not None:
            log.add(progress.step, loss, time.perf_counter() - start)
        if progress.step % args.checkpoint_every == 0:
            accelerator.save_state(str(args.out / "checkpoints" / f"step-{progress.step:06}"))
    hook.remove()
    if progress.step < args.steps:
        return
    accelerator.wait_for_everyone()
    final = attached.get()
    attached.remove()  # the thresholds go into a file of their own, and the model is one that diffusers knows
    state = accelerator.get_state_dict(student)
    if accelerator.is_main_process:
        if args.lora:
            model.save_lora_adapter(args.out)
        else:
            model.save_pretrained(args.out, state_dict=state)
        final.save(args.out / "sparge.json")
        print(
            f"{args.out} holds the {'adapters' if args.lora else 'model'} and sparge.json: from_pretrained"
            f"{' and load_lora_adapter' if args.lora else ''}, then "
            f'torch.compile(model, backend="sparge", options={{"calibration": "{args.out / "sparge.json"}"}})'
        )


def make_smoke(folder: Path) -> None:
    """A tiny model with random weights, and some clips of noise."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "text_dim": 16}
    model = WanTransformer3DModel(**sizes, freq_dim=16, ffn_dim=64, num_layers=2, rope_max_seq_len=32)
    model.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for number in range(4):
        clip: dict[str, Tensor] = {"latents": torch.randn(4, 4, 16, 16), "text": torch.randn(12, 16)}
        save_file(clip, folder / "data" / f"{number}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with a WanTransformer3DModel")
    parser.add_argument("--data", type=Path, help="a folder of .safetensors files")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--calibration", type=Path, help="thresholds for each site; instead of --topk and --topp")
    parser.add_argument("--topk", type=float, default=0.03, help="(0.03, as published)")
    parser.add_argument("--topp", type=float, default=0.2, help="(0.2, as published for Wan 1.3B at 480p; 14B: 0.16)")
    parser.add_argument("--order", choices=("tiles", "raster"), default="tiles", help="of tokens in blocks (tiles)")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=1e-5, help="at its highest (1e-5)")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--batch-size", type=int, default=1, help="clips for each process and micro-batch (1)")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches in a step (1)")
    parser.add_argument("--shift", type=float, default=5.0, help="of the timesteps towards noise (5)")
    parser.add_argument("--anneal", type=int, default=0, help="steps from gentle thresholds to the target (0)")
    parser.add_argument("--layers", type=float, default=0.0, help="weight of the errors of attention outputs (0)")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0: all weights are trained")
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--stop-after", type=int, default=0, help="end after this step, to go on later")
    parser.add_argument("--min-seq-len", type=int, help="sites with fewer keys stay dense (the cost model decides)")
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tensorboard", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and random clips, six steps on the CPU")
    parser.add_argument("--smoke-on-gpus", action="store_true", help="the same on a GPU for each process, in float32")
    args = parser.parse_args()
    args.smoke |= args.smoke_on_gpus
    if not args.smoke:
        if not (args.model and args.data and args.out):
            parser.error("--model, --data and --out are needed (or --smoke)")
        train(args)
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        make_smoke(folder)
        print("Random weights and noise: the losses show that it runs, and need not fall.")
        if args.out is None:
            print("What comes out is thrown away: --out FOLDER keeps it.")
        args.model, args.data, args.out = folder / "model", folder / "data", args.out or folder / "out"
        args.inner, args.min_seq_len, args.topk, args.topp = "eager", 64, 0.3, 0.0
        args.cpu = not args.smoke_on_gpus
        args.steps, args.lr, args.checkpoint_every = 6, 1e-3, 2
        train(args)


if __name__ == "__main__":
    main()
