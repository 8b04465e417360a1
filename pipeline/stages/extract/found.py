"""What the stage `extract` found, as later stages read it: the images on which units respond most."""

from pipeline.stages.extract.pictures import top_images as top_images
