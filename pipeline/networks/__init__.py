"""Networks: build, load, inspect and run them."""
