"""What a masked diffusion model is: families, the denoiser around a backbone, the quality head, sanity checks."""
