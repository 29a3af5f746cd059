"""Programs of other environments, as their users write them."""
