"""Generate `config/README.md` and `config/schema.json` by running `pipeline.run.config_docs`, a layer further up."""

import runpy

runpy.run_module("pipeline.run.config_docs", run_name="__main__")
