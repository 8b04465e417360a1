"""Library-specific code; every module `of_<library>` has the same functions.

builder(spec) -> callable   makes the network of a description from its arguments, without weights
state(spec, device)         the state dict that the library makes of its published file, on the CPU or the meta device
describe(spec) -> Published what the library says of a network: where its weights are published and what they expect
fetch(spec) -> None         puts the published file where `pipeline.networks.published` looks for it

Importing one imports torch and its library.
"""
