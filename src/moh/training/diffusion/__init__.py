"""Training of class-conditional diffusion models, MoH or dense, on pixels or latents (extra `diffusion`)."""

from moh._extras import require

require("diffusers", extra="diffusion")
