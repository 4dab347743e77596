"""Training of class-conditional diffusion models, MoH or dense, on pixels or latents (extra `diffusion`)."""
