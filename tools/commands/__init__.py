"""Commands of the program `trimtab`: one module each, with `add_arguments` and `run`."""
