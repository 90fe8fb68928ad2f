"""The commands of the program `trimtab`, one file each, with `add_arguments` and `run`."""
