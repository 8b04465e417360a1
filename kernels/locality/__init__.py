"""Where layers look: attention distance, receptive fields, localisation, skip connections."""
