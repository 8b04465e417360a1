"""Which images the statistics of a data set are made of."""

import hashlib

import numpy as np

from pipeline.stages.visualize.facts import first_by_hash


def test_statistics_are_of_images_of_every_class():
    """A listing goes by folder; the images are those of the first hashes, and a new one replaces one at most."""
    names = [f"{folder}/{number}.jpg" for folder in ("ape", "bee", "cat", "doe") for number in range(100)]
    slots, ids = np.arange(0, 400, 2), np.array(names, object)
    found = first_by_hash(slots, ids, 40)
    digests = {slot: hashlib.sha256(names[slot].encode()).hexdigest() for slot in slots.tolist()}
    assert found.tolist() == sorted(sorted(digests, key=digests.__getitem__)[:40])
    assert {names[slot].partition("/")[0] for slot in found.tolist()} == {"ape", "bee", "cat", "doe"}
    added = first_by_hash(np.append(slots, 1), ids, 40)
    assert len(set(found.tolist()) - set(added.tolist())) <= 1 and (np.diff(added) > 0).all()
    assert first_by_hash(slots, ids, 1024).tolist() == slots.tolist()
