"""What is done to a tiny pipeline in the rows of combinations.py; each takes the pipeline and gives it back."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sparge_compile import Calibration, attach

sys.path += [str(Path(__file__).parent.parent / "tests" / folder) for folder in ("whole", "eager")]
import flash_3
import flash_library
import other_libraries
import tiny_images
import tiny_pipelines

CPU = torch.device("cpu")
FEW = (0.3, 0.0)  # a third of the blocks


def wan() -> Any:
    return built(tiny_pipelines.wan)


def built(build: Callable[[], Any]) -> Any:
    pipe = tiny_pipelines.seeded(build)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip(pipe: Any, **more: Any) -> Tensor:
    """Latents of four steps, in each of which the model is called twice."""
    small = {"height": 160, "width": 160, "num_frames": 9, "num_inference_steps": 4, "max_sequence_length": 16}
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", **{"output_type": "latent", **small, **more}, generator=generator, return_dict=False)[0]


def image(pipe: Any, **more: Any) -> Tensor:
    """Latents of two steps of SDXL, with guidance a batch of two."""
    small = {"height": 256, "width": 256, "num_inference_steps": 2}
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", **{"output_type": "latent", **small, **more}, generator=generator, return_dict=False)[0]


def without(settings: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != name}


def by_block(model: Any, options: dict[str, Any]) -> None:
    model.compile_repeated_blocks(backend="sparge", options=options)


# ---- offloading


def sequential(pipe: Any) -> Any:
    """What a pipeline's ``enable_sequential_cpu_offload`` does to its denoiser."""
    import accelerate

    accelerate.cpu_offload(pipe.transformer, execution_device=CPU, offload_buffers=True)
    return pipe


def by_model(pipe: Any) -> Any:
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe


def by_group(**how: Any) -> Callable[[Any], Any]:
    def offload(pipe: Any) -> Any:
        pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, **how)
        return pipe

    return offload


def cast_by_layer(pipe: Any) -> Any:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return pipe


# ---- caches of diffusers


def caching(kind: str, **how: Any) -> Callable[[Any], Any]:
    def cache(pipe: Any) -> Any:
        import diffusers

        if kind == "PyramidAttentionBroadcastConfig":
            how["current_timestep_callback"] = lambda: pipe.current_timestep
        pipe.transformer.enable_cache(getattr(diffusers, kind)(**how))
        return pipe

    return cache


# ---- backends of diffusers


def attends_by(backend: str) -> Callable[[Any], Any]:
    def choose(pipe: Any) -> Any:
        pipe.transformer.set_attention_backend(backend)
        return pipe

    return choose


def attends_by_stand_in(backend: str, package: str, **functions: Any) -> Callable[[Any], Any]:
    """A backend whose library wants a GPU, with functions of the library's signatures in their places."""

    def choose(pipe: Any) -> Any:
        from diffusers.models import attention_dispatch as dispatch

        with mock.patch.object(dispatch, f"_CAN_USE_{package}", True):
            pipe.transformer.set_attention_backend(backend)
        vars(dispatch).update(functions)
        return pipe

    return choose


def _memory_efficient(query, key, value, attn_bias=None, p=0.0, scale=None):
    return torch.ops.sparge_others.memory_efficient_attention_forward(query, key, value, attn_bias, p, scale)


by_flash = attends_by_stand_in("flash", "FLASH_ATTN", flash_attn_func=flash_library.flash_attn_func)
by_flash_3 = attends_by_stand_in("_flash_3", "FLASH_ATTN_3", _wrapped_flash_attn_3=flash_3.diffusers_flash_3)
by_sage = attends_by_stand_in("sage", "SAGE_ATTN", sageattn=other_libraries.sageattn)
by_xformers = attends_by_stand_in(
    "xformers", "XFORMERS_ATTN", xops=SimpleNamespace(memory_efficient_attention=_memory_efficient)
)


# ---- other parts of a pipeline


def sdxl() -> Any:
    return built(tiny_images.sdxl)


def flux() -> Any:
    return built(tiny_images.flux)


def controlled() -> Any:
    import diffusers

    pipe = sdxl()
    torch.manual_seed(4)
    control = tiny_pipelines.shaken(diffusers.ControlNetModel.from_unet(pipe.unet))
    made = diffusers.StableDiffusionXLControlNetPipeline(**pipe.components, controlnet=control)
    made.set_progress_bar_config(disable=True)
    return made


def shown_an_image(pipe: Any) -> Any:
    """An IP-Adapter of four tokens for a picture."""
    torch.manual_seed(5)
    width, wide = pipe.unet.config.cross_attention_dim, 16
    to_text = [x for name, x in pipe.unet.named_modules() if name.endswith("attn2")]
    adapter = {
        f"{2 * i + 1}.to_{kind}_ip.weight": torch.randn(x.to_k.out_features, width)
        for i, x in enumerate(to_text)
        for kind in "kv"
    }
    projection = {"proj.weight": torch.randn(4 * width, wide), "proj.bias": torch.zeros(4 * width)}
    norm = {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection | norm, "ip_adapter": adapter}])
    return pipe


def tiled(pipe: Any) -> Any:
    pipe.vae.enable_tiling()
    return pipe


def averaged(pipe: Any) -> None:
    """Weights whose place an average of them takes, as before an evaluation."""
    from diffusers.training_utils import EMAModel

    mean = EMAModel(pipe.transformer.parameters(), decay=0.5)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(1.1)
    mean.step(pipe.transformer.parameters())
    mean.copy_to(pipe.transformer.parameters())


def saved_and_loaded(pipe: Any) -> Any:
    with TemporaryDirectory() as folder:
        attach(pipe.transformer, Calibration({"blocks.*.attn1": [FEW]}))
        pipe.transformer.save_pretrained(folder)
        pipe.transformer = type(pipe.transformer).from_pretrained(folder).eval()
    return pipe


def blocks_of_unet(model: Any, options: dict[str, Any]) -> None:
    for module in model.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.compile(backend="sparge", options=options)


# ---- accelerate


def named_to_accelerate(pipe: Any) -> Any:
    from accelerate.utils import TorchDynamoPlugin

    return TorchDynamoPlugin(backend="sparge")


def prepared(pipe: Any) -> None:
    from accelerate import Accelerator

    pipe.transformer = Accelerator(cpu=True).prepare_model(pipe.transformer, evaluation_mode=True)


# ---- deepspeed


def by_deepspeed(stage: int) -> Callable[[Any], None]:
    """The denoiser in an engine of one process at a stage of ZeRO, to be trained at a rate that changes nothing."""

    def put(pipe: Any) -> None:
        import deepspeed

        os.environ.setdefault("LOCAL_RANK", "0")
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        model, untested = pipe.transformer, {"zero_allow_untested_optimizer": True}
        pipe.engine = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
            config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, **untested},
        )[0]

    return put


def gradient(pipe: Any) -> Tensor:
    """That of the first weights of the denoiser, in a step of training."""
    from deepspeed.utils import safe_get_full_grad

    text = torch.linspace(-1, 1, 16 * tiny_pipelines.texts.WIDTH).view(1, 16, -1)
    noise = torch.randn(1, 4, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        out = pipe.engine(noise, torch.tensor([500]), text, return_dict=False)[0]
        pipe.engine.backward(out.square().mean())
    found = safe_get_full_grad(pipe.transformer.patch_embedding.weight).clone()
    pipe.engine.step()
    return found
