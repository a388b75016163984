"""Training objectives and everything around them; `python -m prism_pipelines.training` runs one."""
