"""The subcommands of `fxpass`, one file each."""
