"""The command `prism`, a file for each subcommand."""
