"""Draw, train and measure the demo base: a miniature Z-Image that is shipped with the package. Start at train.py."""
