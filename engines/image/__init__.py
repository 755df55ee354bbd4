"""Text to image: latent diffusion over the diffusers ONNX layout."""
