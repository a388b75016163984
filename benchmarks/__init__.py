"""Commands that measure: every figure of README and docs, with its JSON in docs/figures. Run from the repository."""
