"""Fine-tuning by distillation: a sparse student learns to give what the dense model gives, in a loop of your own.

    python examples/05_distill.py

It learns two clips by heart, which takes seconds. finetune_video_transformer.py has what real training needs: data,
checkpoints, several GPUs, LoRA.
"""

import torch
from video_model import VideoModel, clip, relative_error

import sparge_compile

torch.manual_seed(0)
model, clips = VideoModel(), [clip(seed=0), clip(seed=1)]
with torch.no_grad():
    dense = model(*clips[0])
student = torch.compile(model, backend="sparge", options={"topk": 0.05, "topp": 0.0, "inner": "eager"})
hook = sparge_compile.DistillationHook(student)  # the teacher is a dense, frozen copy of the weights as they are now
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4)

errors = []
for step in range(21):
    output = student(*clips[step % 2])  # the teacher runs on the same clip
    loss = hook.loss()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 4 == 0:  # the first clip's turn
        errors.append(relative_error(output, dense))
        print(f"step {step}: loss {loss.item():.4f}, relative error of the output {errors[-1]:.1%}")
hook.remove()
