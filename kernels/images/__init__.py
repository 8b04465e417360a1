"""Operations on images: grey, whitening, colour names, corruption, segmentation."""
