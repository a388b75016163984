"""From and to disk and the Hub: backbones, heads, adapters, published repositories and their cards."""
