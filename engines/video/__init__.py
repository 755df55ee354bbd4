"""Text to video: frames of a latent diffusion model, encoded as they are made."""
