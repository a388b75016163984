"""Filling a canvas: what goes in, the loop over blocks and steps, cached forward passes, stopping, the trace."""
