"""Drawing images with diffusion models: samplers, guidance, several processes, files (extra `diffusion`)."""

from moh._extras import require

require("diffusers", extra="diffusion")
require("torchvision", extra="diffusion")

from moh.sampling.checkpoint import ImageModel, load_image_model, load_vae, save_image_model, save_with_parts_of
from moh.sampling.denoising import sample
from moh.sampling.files import image_grid, sample_to_files, write_npz, write_png
from moh.sampling.schedulers import SAMPLERS, SamplingSettings, diffusion_scheduler

__all__ = [
    "SAMPLERS",
    "ImageModel",
    "SamplingSettings",
    "diffusion_scheduler",
    "image_grid",
    "load_image_model",
    "load_vae",
    "sample",
    "sample_to_files",
    "save_image_model",
    "save_with_parts_of",
    "write_npz",
    "write_png",
]
