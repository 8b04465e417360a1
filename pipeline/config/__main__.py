"""Generate `config/README.md` and `config/schema.json`: the program is `pipeline.run.config_docs`, further up."""

import runpy

runpy.run_module("pipeline.run.config_docs", run_name="__main__")
