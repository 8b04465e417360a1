"""The stages, one package each; `registry` lists them."""
