"""Looking after a results folder: find damage, have only that made again, say why something would run, sweep up."""
