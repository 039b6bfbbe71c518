"""Two processes that train the same student in every way there is; what each found goes into a file.

Over NCCL where there are two GPUs, else over gloo. Run by test_parallel.py. Every scenario gives its losses, or the
text of what went wrong.
"""

from __future__ import annotations

import copy
import itertools
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from test_hook import SPARSE, Plain, compiled, compiled_blocks, with_adapters
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import sparge_compile.ops
from sparge_compile import Calibration, DistillationHook, SparsitySchedule, attach

STEPS, WORLD, LENGTH = 4, 2, 256
ON_GPUS = torch.cuda.device_count() >= WORLD
STARTING: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "lora": with_adapters,
    "lora, checkpointed": lambda: with_adapters(Plain(reentrant=False)),
}


def here() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if ON_GPUS else torch.device("cpu")


def start(kind: str = "plain") -> nn.Module:
    """The same model in every process and scenario."""
    torch.manual_seed(1)
    torch._dynamo.reset()
    return STARTING[kind]().to(here())


def global_batch(step: int) -> Tensor:
    """The same at every step, so that losses must fall."""
    return torch.randn(4, LENGTH, 32, generator=torch.Generator().manual_seed(0)).to(here())


def my_batch(step: int) -> Tensor:
    return global_batch(step).chunk(WORLD)[dist.get_rank()]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def mean_over_ranks(x: Tensor) -> float:
    x = x.detach().clone()
    dist.all_reduce(x)
    return x.item() / WORLD


def train(
    student: nn.Module,
    hook: DistillationHook,
    optimizer: torch.optim.Optimizer,
    steps: range = range(STEPS),
    backward: Callable[[Tensor], None] = Tensor.backward,
    of: Callable[[int], Tensor] = my_batch,
) -> list[float]:
    losses = []
    for step in steps:
        student(of(step))
        loss = hook.loss()
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over_ranks(loss))
    return losses


def single(kind: str = "plain", **options: object) -> list[float]:
    """What one process gives with the whole batch."""
    student = compiled(start(kind))
    with DistillationHook(student, **options) as hook:
        return train(student, hook, optimizer_of(student), of=global_batch)


def ddp() -> list[float]:
    student = DistributedDataParallel(compiled(start()))
    with DistillationHook(student, layers=0.1) as hook:
        return train(student, hook, optimizer_of(student))


def lora() -> list[float]:
    student = DistributedDataParallel(compiled(start("lora")))
    with DistillationHook(student) as hook:
        assert hook.teacher is student.module._orig_mod
        return train(student, hook, optimizer_of(student))


def sharded(kind: str = "plain", **how: object) -> tuple[nn.Module, DistillationHook, torch.optim.Optimizer]:
    """A student under FSDP2, and its teacher, which for adapters is the student without them."""
    model = start(kind)
    teacher = copy.deepcopy(model) if kind == "plain" else None
    compiled_blocks(model)
    for each in (model, teacher):
        if each is not None:
            for block in each.blocks:
                fully_shard(block, **how)
            fully_shard(each, **how)
    return model, DistillationHook(model, teacher, layers=0.1), optimizer_of(model)


def fsdp(kind: str = "plain", **how: object) -> list[float]:
    student, hook, optimizer = sharded(kind, **how)
    with hook:
        return train(student, hook, optimizer)


def fsdp_needs_a_teacher() -> str:
    try:
        DistillationHook(fully_shard(compiled_blocks(start())))
    except ValueError as error:
        return str(error)
    return "no error"


def accelerated() -> list[float]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not ON_GPUS)
    student = compiled(start())
    student, optimizer = accelerator.prepare(student, optimizer_of(student))
    with DistillationHook(student) as hook:
        return train(student, hook, optimizer, backward=accelerator.backward)


def resumed(alone: bool = False) -> list[float]:
    """Half of the steps, a checkpoint, everything made anew, and the other half: each process ``alone``, or both."""
    folder = Path(sys.argv[2]) / f"checkpoint {alone}"
    student, hook, optimizer = sharded()
    with hook:
        losses = train(student, hook, optimizer, range(STEPS // 2))
        model_state, optimizer_state = get_state_dict(student, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state, "hook": hook}, checkpoint_id=folder)
    if alone:
        groups = [dist.new_group([rank]) for rank in range(WORLD)]
        group: dist.ProcessGroup | None = groups[dist.get_rank()]
        student, hook, optimizer = sharded(mesh=DeviceMesh.from_group(group, here().type))
    else:
        group = None
        student, hook, optimizer = sharded()
    with hook:
        model_state, optimizer_state = get_state_dict(student, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state, "hook": hook}
        dcp.load(state, checkpoint_id=folder, process_group=group)
        set_state_dict(student, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
        of = global_batch if alone else my_batch
        return losses + train(student, hook, optimizer, range(STEPS // 2, STEPS), of=of)


def annealed(resume: bool) -> list[float]:
    """A schedule, whose state is saved and loaded on the way where ``resume``."""

    def make() -> tuple[nn.Module, SparsitySchedule]:
        model = start()
        schedule = SparsitySchedule(attach(model, Calibration({"*": [(0.1, 0.0)]})), steps=STEPS)
        return compiled(model), schedule

    student, schedule = make()
    hook, optimizer, losses = DistillationHook(student), optimizer_of(student), []
    for step in range(STEPS):
        if resume and step == STEPS // 2:
            states = [copy.deepcopy(x.state_dict()) for x in (student, optimizer, schedule, hook)]
            student, schedule = make()
            hook, optimizer = DistillationHook(student), optimizer_of(student)
            for x, state in zip((student, optimizer, schedule, hook), states, strict=True):
                x.load_state_dict(state)
        losses += train(student, hook, optimizer, range(step, step + 1))
        schedule.step()
    return losses


class Ulysses(Plain):
    """Each process has a part of the sequence; attention is over the whole of it, for a part of the heads."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            q, k, v = (self.to_heads(y) for y in block.qkv(x).unflatten(-1, (3, 2, -1)).unbind(2))
            out = F.scaled_dot_product_attention(q, k, v)  # [B, H / world, L, D]
            x = x + block.out(self.to_rows(out))
        return x

    @staticmethod
    def exchange(x: Tensor) -> Tensor:
        from torch.distributed._functional_collectives import all_to_all_single_autograd

        return all_to_all_single_autograd(x.contiguous(), None, None, dist.group.WORLD)

    def to_heads(self, x: Tensor) -> Tensor:
        """[B, L / world, H, D] to [B, H / world, L, D]."""
        parts = self.exchange(x.unflatten(2, (WORLD, -1)).permute(2, 0, 1, 3, 4))  # [world, B, L / world, H / world, D]
        return parts.permute(1, 3, 0, 2, 4).flatten(2, 3)

    def to_rows(self, x: Tensor) -> Tensor:
        """[B, H / world, L, D] to [B, L / world, H · D]."""
        parts = self.exchange(x.unflatten(2, (WORLD, -1)).permute(2, 0, 3, 1, 4))  # [world, B, L / world, H / world, D]
        return parts.permute(1, 2, 0, 3, 4).flatten(2)


STARTING["ulysses"] = Ulysses


def ulysses() -> list[float]:
    student = DistributedDataParallel(compiled(start("ulysses")))
    with DistillationHook(student) as hook:
        rank = dist.get_rank()
        return train(student, hook, optimizer_of(student), of=lambda step: global_batch(step).chunk(WORLD, 1)[rank])


def wan_ulysses() -> float:
    """diffusers' context parallelism in inference: the largest difference to one process, both sparse."""
    from diffusers import ContextParallelConfig, WanTransformer3DModel

    torch.manual_seed(0)
    torch._dynamo.reset()
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "text_dim": 16}
    model = WanTransformer3DModel(**sizes, freq_dim=16, ffn_dim=64, num_layers=1, rope_max_seq_len=32).eval().to(here())
    inputs = {
        "hidden_states": torch.randn(1, 4, 4, 16, 16).to(here()),
        "timestep": torch.tensor([500]).to(here()),
        "encoder_hidden_states": torch.randn(1, 12, 16).to(here()),
        "return_dict": False,
    }
    options = {**SPARSE, "min_seq_len": 64}
    with torch.no_grad():
        alone = torch.compile(model, backend="sparge", options=options)(**inputs)[0]
        with mock.patch.object(torch.accelerator, "device_count", return_value=WORLD):  # it divides by their number
            model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=WORLD))
        torch._dynamo.reset()
        sites = sparge_compile.explain(model, options)(**inputs).sparse
        assert [(row.name, row.shapes["keys"]) for row in sites] == [("blocks.0.attn1", 256)], sites
        together = torch.compile(model, backend="sparge", options=options)(**inputs)[0]
        dense = model(**inputs)[0]
    assert (dense - alone).abs().max() > 1e-3, "thresholds that change nothing show nothing"
    return (together - alone).abs().max().item()


def dtensor() -> list[float]:
    """The largest difference of the op and its gradients to plain tensors, for each way to shard them."""
    mesh = init_device_mesh(here().type, (WORLD,))
    torch.manual_seed(0)
    qkv = tuple(torch.randn(1, heads, 300, 16).to(here()) for heads in (4, 2, 2))
    thresholds = torch.tensor([[0.2, 0.0], [0.4, 0.0], [0.3, 0.2], [0.9, 0.1]], device=here())
    mask = torch.arange(300, device=here())[None, None, None] < 290

    order = torch.ops.sparge.order(0, 3, 10, 10, 0, [2, 4, 8], mask.device)
    tiles = {"slots_q": order[0], "places_q": order[1], "slots_k": order[0], "places_k": order[1]}

    def run(tensors: list[Tensor], **of_tokens: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = torch.ops.sparge.attention(*leaves, thresholds, mask, **of_tokens)
        (out * out).sum().backward()
        found = [out, *(x.grad for x in leaves)]
        return [x.full_tensor() if hasattr(x, "full_tensor") else x for x in found]

    apart = []
    for placement, of_tokens in itertools.product((Shard(1), Shard(2), Replicate()), ({}, tiles)):
        want = run(list(qkv), **of_tokens)
        got = run([distribute_tensor(x, mesh, [placement]) for x in qkv], **of_tokens)
        apart.append(max((a - b).abs().max().item() for a, b in zip(got, want, strict=True)))
    heads = [distribute_tensor(x, mesh, [Shard(1)]) for x in qkv]
    out = torch.ops.sparge.attention(*heads, thresholds)
    assert out.placements == (Shard(1),) and out.to_local().shape[1] == 2, "heads were not left where they are"
    return apart


SCENARIOS: dict[str, Callable[[], object]] = {
    "single": single,
    "single, layers": lambda: single(layers=0.1),
    "single, lora": lambda: single("lora"),
    "ddp": ddp,
    "lora": lora,
    "fsdp": fsdp,
    "fsdp without a teacher": fsdp_needs_a_teacher,
    "accelerate": accelerated,
    "single, layers, lora": lambda: single("lora", layers=0.1),
    "fsdp, lora, checkpointed": lambda: fsdp("lora, checkpointed"),
    "fsdp, offloaded": lambda: fsdp(offload_policy=CPUOffloadPolicy(pin_memory=ON_GPUS)),
    "resumed": resumed,
    "resumed by one": lambda: resumed(alone=True),
    "annealed": lambda: annealed(False),
    "annealed, resumed": lambda: annealed(True),
    "ulysses": ulysses,
    "wan": wan_ulysses,
    "dtensor": dtensor,
}


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = "29500"  # read by accelerate, and not used: there is a process group already
    if ON_GPUS:
        torch.cuda.set_device(rank)
    # What is offloaded to the CPU is summed there.
    backend = "cpu:gloo,cuda:nccl" if ON_GPUS else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=WORLD)
    found: dict[str, object] = {}
    for name, scenario in SCENARIOS.items():
        if sys.argv[3:] and name not in sys.argv[3:]:
            continue
        try:
            found[name] = scenario()
        except Exception:  # told by the test of this scenario
            found[name] = traceback.format_exc()
    torch.save(found, folder / f"found_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
