"""What an edit costs on the machine at hand, at the full size of Stable Diffusion 1.5, with random weights: no download.

    python benchmark.py                          # 512x512, 4 steps
    python benchmark.py --save random-sd15       # also writes the model, for edit.py --model random-sd15
"""
import platform
import resource
import time
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cli import Parser, device, positive_int
from uip2p import EditModel
from unet import SD15, UNet
from vae import SD15_VAE, VAE

TOKENIZER = Path(__file__).resolve().parent / "models/toy/tokenizer"


def random_model(where, dtype):
    """InstructPix2Pix with random weights: UNet 860 M parameters, VAE 84 M, text encoder 123 M."""
    torch.manual_seed(0)
    with torch.device(where):
        parts = UNet(SD15), VAE(SD15_VAE), CLIPTextModel(CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408))
    return EditModel(*(part.to(dtype).requires_grad_(False).eval() for part in parts),
                     CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77), {"steps_offset": 1})


def main():
    p = Parser("benchmark.py", description=__doc__.split("\n")[0])
    p.add_argument("--resolution", type=positive_int, default=512)
    p.add_argument("--steps", type=positive_int, default=4)
    p.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32")
    p.add_argument("--save", help="folder for the random model")
    args = p.parse_args()
    model = random_model(args.device, {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.precision])
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, {platform.machine()}, torch {torch.__version__}, {args.precision}, "
          f"{args.resolution}x{args.resolution}, {args.steps} steps, three branches of guidance")
    if args.save:
        model.save_pretrained(args.save)
    images = torch.rand(1, 3, args.resolution, args.resolution) * 2 - 1
    for attempt in ("first", "second"):
        start = time.time()
        try:
            model.edit(images, ["make it snow"], args.steps).cpu()
        except ValueError as error:                           # a resolution or number of steps that the model cannot do
            p.error(str(error))
        print(f"{attempt} edit: {time.time() - start:.1f} s")
    peak = torch.cuda.max_memory_allocated() if args.device.startswith("cuda") else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory: {peak / 2 ** 30:.1f} GiB")


if __name__ == "__main__":
    main()
