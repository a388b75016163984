"""The package inside other libraries: diffusers' LLaDA2Pipeline and lm-eval."""
