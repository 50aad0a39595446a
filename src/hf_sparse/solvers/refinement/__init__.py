"""What follows the mask: refit of the kept values, rounding, and a low-rank part beside them."""
