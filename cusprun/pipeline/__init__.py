"""The stages of the product as public functions; everything heavy is imported inside them."""
