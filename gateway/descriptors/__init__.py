"""What models can be told: descriptors of workers, read from the registry when a caller asks for them."""
